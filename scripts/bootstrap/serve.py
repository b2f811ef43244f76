"""What scripts/serve does: plan, checks, installation, then this process becomes `causerie serve`.

Started again it finds the stamp and does none of it. Asked nothing, reads nothing from stdin.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from bootstrap import problems, torch_choice
from bootstrap.environment import Environment, install
from bootstrap.plan import Step, render
from bootstrap.problems import Problem, SetupError

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_PORT = 8000
# The model: from the hub as published, or less from the package that carries it 4-bit; kept: source and result.
MODEL_DOWNLOAD_MB, MODEL_DISK_MB, MODEL_MINUTES = 272, 450, 2.5
PACKAGES_DOWNLOAD_MB, PACKAGES_DISK_MB = 110, 340
HELP = """\
usage: scripts/serve [--model NAME|DIR|HUB_ID] [--host 127.0.0.1] [--port 8000] [any flag of `causerie serve`]

Sets up .venv on its first run, then starts the chat page and the API. With no flag: http://127.0.0.1:8000/
Environment: PYTHON, CAUSERIE_TORCH_INDEX, CAUSERIE_CACHE, CAUSERIE_VENV (see docs/configuration.md).
Once set up, this shows the full help of `causerie serve`."""


@dataclass(frozen=True, slots=True)
class Target:
    """What of the command line and the environment the set-up needs to know. `causerie serve` reads them properly."""

    model: str
    host: str
    port: int
    only_shows_something: bool


def main(arguments: list[str]) -> int:
    root = Path(__file__).resolve().parents[2]
    environment = Environment(root, venv_directory(root, os.environ))
    try:
        return set_up_and_serve(environment, arguments, os.environ)
    except SetupError as error:
        return _refuse([error.problem])
    except KeyboardInterrupt:
        _say("\nStopped. Run scripts/serve again: it goes on from here.")
        return 130


def set_up_and_serve(environment: Environment, arguments: list[str], variables: Mapping[str, str]) -> int:
    target = read_target(arguments, variables)
    ready = environment.is_ready(extras=())
    if not ready and {"-h", "--help"} & set(arguments):
        print(HELP)
        return 0
    taken = None if target.only_shows_something else problems.check_port(target.host, target.port)
    found = [taken] if taken else []
    if not ready:
        _say(render("Causerie is set up first:", first_run_steps(environment, target, variables)))
        found += check_before_install(environment, variables)
    if found:
        return _refuse(found)
    if not ready:
        install(environment, (), variables, say=lambda line: _say(f"  - {line}"))
    return become_server(environment, arguments)


def become_server(environment: Environment, arguments: Sequence[str]) -> NoReturn:
    """In place of this process: signals, exit status and terminal are the server's own."""
    os.execv(environment.command("causerie"), ["causerie", "serve", *arguments])  # noqa: S606


def read_target(arguments: Sequence[str], variables: Mapping[str, str]) -> Target:
    """Flag, then environment, then configuration file, then default; what is malformed is left to `causerie serve`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--model", "--host", "--port", "--config"):
        parser.add_argument(flag)
    try:
        flags, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        flags, rest = argparse.Namespace(model=None, host=None, port=None, config=None), list(arguments)
    file = _read_toml(flags.config or variables.get("CAUSERIE_CONFIG"))

    def value_of(name: str, default: object) -> str:
        return str(getattr(flags, name) or variables.get(f"CAUSERIE_{name.upper()}") or file.get(name) or default)

    port = value_of("port", DEFAULT_PORT)
    return Target(
        model=value_of("model", DEFAULT_MODEL),
        host=value_of("host", "127.0.0.1"),
        port=int(port) if port.isdecimal() and int(port) < 65_536 else DEFAULT_PORT,
        only_shows_something=bool({"-h", "--help", "--print-config"} & set(rest)),
    )


def check_before_install(environment: Environment, variables: Mapping[str, str]) -> list[Problem]:
    cuda = torch_choice.has_nvidia_driver()
    torch_mb = torch_choice.CUDA_DISK_MB if cuda else torch_choice.CPU_DISK_MB
    existing = next(path for path in (environment.directory, *environment.directory.parents) if path.exists())
    found = [
        problems.check_python(sys.version_info[:2], lambda name: importlib.util.find_spec(name) is not None),
        problems.check_writable(
            environment.directory, "name a folder that can be written to: CAUSERIE_VENV=/path scripts/serve"
        ),
        problems.check_writable(
            cache_directory(variables), "name a folder that can be written to: CAUSERIE_CACHE=/path scripts/serve"
        ),
        problems.check_disk(
            existing, torch_mb + PACKAGES_DISK_MB + MODEL_DISK_MB, shutil.disk_usage(existing).free // 1_000_000
        ),
        problems.check_proxy(variables),
    ]
    return [problem for problem in found if problem]


def first_run_steps(environment: Environment, target: Target, variables: Mapping[str, str]) -> list[Step]:
    return [*install_steps(environment), model_step(target, cache_directory(variables)), address_step(target)]


def install_steps(environment: Environment) -> list[Step]:
    cuda = torch_choice.has_nvidia_driver()
    torch_mb = (
        (torch_choice.CUDA_DOWNLOAD_MB, torch_choice.CUDA_DISK_MB)
        if cuda
        else (torch_choice.CPU_DOWNLOAD_MB, torch_choice.CPU_DISK_MB)
    )
    build = "with CUDA: an NVIDIA driver is here" if cuda else "CPU build: no NVIDIA driver here"
    return [
        Step(f"make a virtual environment in {environment.directory.name}", 2, 20, 0.2),
        Step(f"install PyTorch ({build})", *torch_mb, 0.3),
        Step("install the other packages", PACKAGES_DOWNLOAD_MB, PACKAGES_DISK_MB, 0.5),
    ]


def model_step(target: Target, cache: Path) -> Step:
    if target.model != DEFAULT_MODEL:
        return Step(f"prepare the model {target.model}", memo="its size: `causerie models list`")
    if any((cache / DEFAULT_MODEL).glob("gptq-*/causerie.json")):
        return Step(f"reuse the model {DEFAULT_MODEL}", memo=f"prepared before, in {cache}")
    return Step(f"download {DEFAULT_MODEL} and quantise it to 4 bits", MODEL_DOWNLOAD_MB, MODEL_DISK_MB, MODEL_MINUTES)


def address_step(target: Target) -> Step:
    host = f"[{target.host}]" if ":" in target.host else target.host
    return Step(f"serve http://{host}:{target.port}/", memo="answers while the model is still prepared")


def cache_directory(variables: Mapping[str, str]) -> Path:
    """As `serving.models.cache_directory` has it, which cannot be imported before it is installed."""
    if variables.get("CAUSERIE_CACHE"):
        return Path(variables["CAUSERIE_CACHE"]).expanduser().absolute()
    if variables.get("XDG_CACHE_HOME"):
        return Path(variables["XDG_CACHE_HOME"]).expanduser().absolute() / "causerie"
    return Path.home() / ".cache" / "causerie"


def venv_directory(root: Path, variables: Mapping[str, str]) -> Path:
    return Path(variables["CAUSERIE_VENV"]).absolute() if variables.get("CAUSERIE_VENV") else root / ".venv"


def _read_toml(file: str | None) -> dict[str, object]:
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError):
        return {}


def _refuse(found: Sequence[Problem]) -> int:
    for problem in found:
        _say(f"scripts/serve: {problem}")
    return 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
