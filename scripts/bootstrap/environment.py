"""The virtual environment in .venv: made, filled and recognised as ready. `install` may be interrupted anywhere.

The stamp, written last, says for which pyproject.toml and which Python the environment was filled; while it fits, a
start runs no pip at all. Called by `serve` and `run_checks`.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bootstrap.pip import Pip
from bootstrap.problems import SetupError
from bootstrap.torch_choice import choose_torch, cpu_index, has_nvidia_driver


@dataclass(frozen=True, slots=True)
class Environment:
    root: Path
    directory: Path

    @property
    def stamp(self) -> Path:
        return self.directory / "causerie-installed.json"

    @property
    def pyproject(self) -> Path:
        return self.root / "pyproject.toml"

    def command(self, name: str) -> Path:
        return self.directory / "bin" / name

    def python_version(self) -> str | None:
        """From pyvenv.cfg, without starting it; None when the environment or the Python it was made from is gone."""
        configuration = self.directory / "pyvenv.cfg"
        if not configuration.exists() or not self.command("python").exists():
            return None
        lines = (line.partition("=") for line in configuration.read_text(encoding="utf-8").splitlines())
        return {key.strip(): value.strip() for key, _, value in lines}.get("version")

    def is_ready(self, extras: Sequence[str]) -> bool:
        """True when the last finished installation was for this pyproject.toml, this Python and at least `extras`."""
        try:
            stamp = json.loads(self.stamp.read_text(encoding="utf-8"))
            fits = stamp["pyproject"] == self._fingerprint() and stamp["python"] == self.python_version()
            return fits and set(extras) <= set(stamp["extras"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def write_stamp(self, extras: Sequence[str]) -> None:
        content = {"pyproject": self._fingerprint(), "python": self.python_version(), "extras": list(extras)}
        unfinished = self.stamp.with_suffix(".tmp")
        unfinished.write_text(json.dumps(content), encoding="utf-8")
        unfinished.replace(self.stamp)

    def torch_requirement(self) -> str:
        project = tomllib.loads(self.pyproject.read_text(encoding="utf-8"))["project"]
        return next(line for line in project["dependencies"] if line.startswith("torch"))

    def _fingerprint(self) -> str:
        # The folder too: an environment that was moved or copied still points to where it was made.
        return hashlib.sha256(self.pyproject.read_bytes() + str(self.root).encode()).hexdigest()


def install(
    environment: Environment, extras: Sequence[str], variables: Mapping[str, str], say: Callable[[str], None]
) -> None:
    """Every step finds out what is there already, so after Ctrl-C the next start goes on instead of starting over."""
    with only_one_at_a_time(environment, say):
        if environment.is_ready(extras):
            return
        environment.stamp.unlink(missing_ok=True)
        say(f"virtual environment: {environment.directory}")
        pip = make_venv(environment)
        remove_half_installed(environment.directory)
        pip.upgrade_itself()
        say("PyTorch: looking at what pip would bring ...")
        choice = choose_torch(
            environment.torch_requirement(), pip, has_driver=has_nvidia_driver(), index=cpu_index(variables)
        )
        say(f"PyTorch: {choice.reason}")
        pip.install("PyTorch", choice.pip_arguments)
        say("the other packages")
        pip.install("Causerie", ["--editable", _target(environment, extras)])
        environment.write_stamp(extras)


def make_venv(environment: Environment) -> Pip:
    """An environment without a working pip is what an interrupted `venv` leaves: made anew."""
    pip = Pip(environment.command("python"))
    if environment.python_version() is not None and pip.version() is not None:
        return pip
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", environment.directory], check=False)
    if made.returncode:
        raise SetupError(
            f"could not make a virtual environment in {environment.directory}",
            "read the message above; a folder that is not ours there has to go: rm -r .venv",
        )
    return pip


def remove_half_installed(directory: Path) -> None:
    """pip takes a package for installed once its metadata is there, even when Ctrl-C left half of its files."""
    for metadata in directory.glob("lib/python*/site-packages/*.dist-info"):
        if not _is_whole(metadata):
            shutil.rmtree(metadata)


def _is_whole(metadata: Path) -> bool:
    record = metadata / "RECORD"
    if not record.exists():
        return False
    with record.open(encoding="utf-8", newline="") as lines:
        return all(os.path.lexists(metadata.parent / row[0]) for row in csv.reader(lines) if row)


@contextmanager
def only_one_at_a_time(environment: Environment, say: Callable[[str], None]) -> Generator[None]:
    """Two starts at once: the second waits for the first. The lock goes with the process, however that ends."""
    with environment.pyproject.open("rb") as locked:
        try:
            fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another scripts/serve or scripts/test is installing; waiting for it ...")
            fcntl.flock(locked, fcntl.LOCK_EX)
        yield


def _target(environment: Environment, extras: Sequence[str]) -> str:
    return f"{environment.root}[{','.join(extras)}]" if extras else str(environment.root)
