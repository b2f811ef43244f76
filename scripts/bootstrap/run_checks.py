"""What scripts/test does: installs what the checks need, runs them all, and closes with a table and what was skipped.

One failing check does not hide the others: all run, and the exit status is 1 if any failed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from bootstrap import problems, torch_choice
from bootstrap.browser import BROWSER_VARIABLE, NO_BROWSER, ensure_browser
from bootstrap.environment import Environment, install
from bootstrap.problems import SetupError
from bootstrap.serve import venv_directory

EXTRAS = ("dev",)
DEV_DISK_MB = 900
CHECKS = ("lint", "types", "unit", "system")
HELP = """\
usage: scripts/test [lint] [types] [unit] [system] [-- PYTEST ARGUMENTS]

Runs the named checks, or all of them. lint: ruff; types: pyright; unit: fast tests with fakes at our own seams;
system: a real model, a real server, a real browser. Sets up .venv first, as scripts/serve does."""


@dataclass(frozen=True, slots=True)
class Counts:
    passed: int = 0
    failed: int = 0
    skipped: tuple[str, ...] = ()  # one reason for each test, so reasons may repeat

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.passed + other.passed, self.failed + other.failed, (*self.skipped, *other.skipped))


@dataclass(frozen=True, slots=True)
class Outcome:
    check: str
    is_passed: bool
    seconds: float
    counts: Counts = field(default_factory=Counts)


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return 0
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    named, pytest_arguments = arguments[:cut], arguments[cut + 1 :]
    unknown = [name for name in named if name not in CHECKS]
    if unknown:
        _say(f"scripts/test: no check is called {unknown[0]!r}; there are {', '.join(CHECKS)}")
        return 2
    root = Path(__file__).resolve().parents[2]
    environment = Environment(root, venv_directory(root, os.environ))
    try:
        set_up(environment, os.environ)
        return run(environment, named or CHECKS, pytest_arguments, dict(os.environ))
    except SetupError as error:
        _say(f"scripts/test: {error.problem}")
        return 1
    except KeyboardInterrupt:
        _say("\nStopped. Run scripts/test again: what is installed stays.")
        return 130


def set_up(environment: Environment, variables: Mapping[str, str]) -> None:
    if environment.is_ready(EXTRAS):
        return
    existing = next(path for path in (environment.directory, *environment.directory.parents) if path.exists())
    cuda = torch_choice.has_nvidia_driver()
    needed_mb = DEV_DISK_MB + (torch_choice.CUDA_DISK_MB if cuda else torch_choice.CPU_DISK_MB)
    for problem in (
        problems.check_python(sys.version_info[:2], lambda name: importlib.util.find_spec(name) is not None),
        problems.check_disk(existing, needed_mb, shutil.disk_usage(existing).free // 1_000_000),
        problems.check_proxy(variables),
    ):
        if problem:
            raise SetupError(problem.what, problem.cure)
    _say(f"Setting up for the checks: about {needed_mb:,} MB in {environment.directory}, once")
    install(environment, EXTRAS, variables, say=lambda line: _say(f"  - {line}"))


def run(
    environment: Environment, checks: Sequence[str], pytest_arguments: Sequence[str], variables: dict[str, str]
) -> int:
    notes: list[str] = []
    if "system" in checks:
        browser = ensure_browser(variables, say=lambda line: _say(f"  - {line}"))
        if browser:
            variables[BROWSER_VARIABLE] = browser
        else:
            notes.append(f"tests of the page: {NO_BROWSER}")
    outcomes = [run_one(environment, check, pytest_arguments, variables) for check in checks]
    print(summarise(outcomes, notes), flush=True)
    return 0 if all(outcome.is_passed for outcome in outcomes) else 1


def run_one(
    environment: Environment, check: str, pytest_arguments: Sequence[str], variables: Mapping[str, str]
) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        started = time.monotonic()
        statuses: list[int] = []
        for command in commands_of(environment, check, pytest_arguments, report):
            print(f"\n== {check}: {Path(command[0]).name} {' '.join(command[1:3])}", flush=True)
            finished = subprocess.run(
                command, cwd=environment.root, env=variables, stdin=subprocess.DEVNULL, check=False
            )
            statuses.append(finished.returncode)
        counts = read_counts(report) if report.exists() else Counts()
        return Outcome(check, not any(statuses), time.monotonic() - started, counts)


def commands_of(environment: Environment, check: str, pytest_arguments: Sequence[str], report: Path) -> list[list[str]]:
    """By full path: nothing here depends on an activated environment."""
    ruff, pyright, python = (str(environment.command(name)) for name in ("ruff", "pyright", "python"))
    if check == "lint":
        return [[ruff, "check", "."], [ruff, "format", "--check", "."]]
    if check == "types":
        return [[pyright, "--pythonpath", python]]
    return [[python, "-m", "pytest", "-m", check, f"--junitxml={report}", "--durations=8", *pytest_arguments]]


def read_counts(report: Path) -> Counts:
    """From pytest's own report."""
    passed = failed = 0
    reasons: list[str] = []
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314 (our own file, written a moment ago)
        skipped = case.find("skipped")
        if skipped is not None:
            reasons.append(f"{case.get('classname')}: {skipped.get('message')}")
        elif case.find("failure") is not None or case.find("error") is not None:
            failed += 1
        else:
            passed += 1
    return Counts(passed, failed, tuple(reasons))


def summarise(outcomes: Sequence[Outcome], notes: Sequence[str]) -> str:
    lines = ["", "== summary"]
    total = Counts()
    for outcome in outcomes:
        total += outcome.counts
        verdict = "passed" if outcome.is_passed else "FAILED"
        lines.append(f"  {outcome.check:<8} {verdict}  {outcome.seconds:5.0f} s")
    together = Counter(total.skipped)
    if notes or together:
        reasons = [f"{reason} ({number} tests)" for reason, number in together.items()]
        lines += ["Skipped, and why:", *(f"  {reason}" for reason in (*notes, *reasons))]
    if any(outcome.check in ("unit", "system") for outcome in outcomes):
        lines.append(f"{total.passed} passed, {total.failed} failed, {len(total.skipped)} skipped")
    return "\n".join(lines)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
