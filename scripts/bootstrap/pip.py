"""pip as this project calls it: dry runs that download nothing, installs that show their progress.

Runs the environment's own pip in a child process; knows neither torch nor what Causerie needs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bootstrap.problems import SetupError
from bootstrap.torch_choice import Candidate, NotResolvedError

# Older ones download whole wheels in a dry run: gigabytes, to answer a question.
PIP_REQUIREMENT = "pip>=25.3"
PIP_MAJOR_MINOR = (25, 3)
_RESUME = "read pip's message above, then run this again: it goes on from here (behind a proxy: set HTTPS_PROXY)"


@dataclass(frozen=True, slots=True)
class Pip:
    python: Path

    def version(self) -> tuple[int, int] | None:
        """None where the environment has no pip that runs."""
        shown = subprocess.run([self.python, "-m", "pip", "--version"], capture_output=True, text=True, check=False)
        numbers = re.match(r"pip (\d+)\.(\d+)", shown.stdout)
        return (int(numbers[1]), int(numbers[2])) if shown.returncode == 0 and numbers else None

    def upgrade_itself(self) -> None:
        """Best effort: an old pip installs as well, it only looks first at a higher price."""
        version = self.version()
        if version is None or version < PIP_MAJOR_MINOR:
            self._run("install", "--quiet", "--upgrade", PIP_REQUIREMENT)

    def resolve(self, arguments: Sequence[str]) -> list[Candidate]:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.json")
            # fast-deps reads a wheel's metadata by range requests where the index does not serve it separately.
            options = ["--dry-run", "--quiet", "--report", str(report), "--use-feature=fast-deps"]
            if "--index-url" in arguments:  # one that can be done without: no long wait for it
                options += ["--retries", "1", "--timeout", "15"]
            tried = subprocess.run(
                self._command("install", *options, *arguments),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            if tried.returncode or not report.exists():
                errors = [line for line in tried.stderr.splitlines() if line.startswith("ERROR: ")]
                raise NotResolvedError(errors[-1].removeprefix("ERROR: ") if errors else tried.stderr.strip()[-300:])
            return read_report(json.loads(report.read_text(encoding="utf-8")))

    def install(self, what: str, arguments: Sequence[str]) -> None:
        # Bytecode is made at first import, only for what is imported: installing takes half the time.
        options = ["install", "--no-compile", *([] if sys.stderr.isatty() else ["--quiet"])]
        if self._run(*options, *arguments):
            raise SetupError(f"pip could not install {what}", _RESUME)

    def _run(self, *arguments: str) -> int:
        """stdout is left to what the caller prints: pip's words all go to stderr."""
        quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}  # the build backend's, on how we laid out the project
        return subprocess.run(
            self._command(*arguments), env=quiet, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False
        ).returncode

    def _command(self, *arguments: str) -> list[str]:
        return [str(self.python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]


def read_report(report: dict[str, Any]) -> list[Candidate]:
    return [
        Candidate(
            name=item["metadata"]["name"].lower(),
            version=item["metadata"]["version"],
            requires=tuple(item["metadata"].get("requires_dist", ())),
        )
        for item in report["install"]
    ]
