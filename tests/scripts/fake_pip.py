"""A virtual environment whose `python` is a program that answers `-m pip` from a script, and writes down every call.

Stands in for pip and the package index, so that each branch of the set-up runs as a real child process, offline.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Source = Literal["usual", "cpu_index", "no_index"]
Report = list[dict[str, object]]

_PROGRAM = """#!{python} -SE
import json, signal, sys
from pathlib import Path
home, arguments = Path({home!r}), sys.argv[1:]
with (home / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
answers = json.loads((home / "answers.json").read_text())
if arguments[-1] == "--version":
    print("pip 26.0 from nowhere")
elif "--dry-run" in arguments:
    source = "no_index" if "--no-index" in arguments else "cpu_index" if "--index-url" in arguments else "usual"
    if source not in answers:
        sys.exit("ERROR: No matching distribution found for " + arguments[-1])
    Path(arguments[arguments.index("--report") + 1]).write_text(json.dumps({{"install": answers[source]}}))
elif any(argument in answers["fails"] for argument in arguments):
    sys.exit("ERROR: the connection was lost")
elif (home / "hangs").exists():
    (home / "hangs").write_text("installing")
    signal.pause()
"""


def package(name: str, version: str = "1.0", requires: tuple[str, ...] = ()) -> dict[str, object]:
    """One entry of pip's installation report, as far as it is read."""
    return {"metadata": {"name": name, "version": version, "requires_dist": list(requires)}}


@dataclass(frozen=True, slots=True)
class FakePip:
    home: Path

    @property
    def python(self) -> Path:
        return self.home / "bin" / "python"

    def answer(self, answers: dict[Source, Report], fails: tuple[str, ...] = ()) -> None:
        """`answers` by where pip is told to look; a source without one finds nothing. An install of `fails` fails."""
        (self.home / "answers.json").write_text(json.dumps({**answers, "fails": fails}))

    def hang(self) -> Path:
        """Makes an install wait for ever. Returns a pipe that says when it has begun."""
        os.mkfifo(self.home / "hangs")
        return self.home / "hangs"

    def installs(self) -> list[list[str]]:
        """What was really installed, options that always come left out."""
        lines = (self.home / "calls.jsonl").read_text().splitlines()
        calls: list[list[str]] = [json.loads(line) for line in lines]
        constant = {"-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--no-compile", "--quiet"}
        real = [call for call in calls if "install" in call and "--dry-run" not in call]
        return [[argument for argument in call if argument not in constant] for call in real]


def make_fake_pip(home: Path) -> FakePip:
    fake = FakePip(home)
    fake.python.parent.mkdir(parents=True)
    fake.python.write_text(_PROGRAM.format(python=sys.executable, home=str(home)))
    fake.python.chmod(0o755)
    (home / "calls.jsonl").touch()
    fake.answer({})
    return fake
