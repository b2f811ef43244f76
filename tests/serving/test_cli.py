from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from quant.errors import CheckpointError
from serving import cli
from serving.child_process import child_environment
from serving.errors import ConfigError

pytestmark = pytest.mark.unit


def command_that(outcome: BaseException | int) -> cli.Command:
    def run(argv: Sequence[str]) -> int:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return run


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (0, 0, ""),
        (2, 2, ""),
        (CheckpointError("config.json is missing;\n  add it"), 1, "causerie: config.json is missing; add it\n"),
        (ConfigError("port must be"), 1, "causerie: port must be\n"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), 1, "No such file or directory: x.txt\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_goes_wrong_is_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outcome: BaseException | int,
    code: int,
    message: str,
) -> None:
    def load(target: str) -> cli.Command:
        return command_that(outcome)

    monkeypatch.setattr(cli, "_load", load)
    assert cli.main(["serve"]) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.endswith(message)
    assert len(output.err.splitlines()) <= 1


def test_a_bug_is_one_line_that_says_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def load(target: str) -> cli.Command:
        raise TypeError("boom")

    monkeypatch.setattr(cli, "_load", load)
    assert cli.main(["serve"]) == 1
    error = capsys.readouterr().err
    assert "internal error, please report it: TypeError: boom (test_cli.py:" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["serv"], "unknown command `serv`; did you mean `serve`?"),
        (["train"], "usage: causerie train STAGE"),
        (["models"], "`models` needs one of: list"),
        (["zzz"], "`causerie --help` lists the commands"),
    ],
)
def test_misuse_says_what_was_meant(arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert hint in capsys.readouterr().err


def test_every_command_is_found_with_the_rest_of_its_words() -> None:
    for name, (target, about) in cli.COMMANDS.items():
        assert cli._find_command([*name.split(), "--flag", "x"]) == (target, ["--flag", "x"])
        assert callable(cli._load(target))
        assert name in cli.usage()
        assert about in cli.usage()


def test_without_words_the_usage_is_shown_as_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: causerie" in capsys.readouterr().out


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from serving.cli import main; main(['--help']); "
        "heavy = {'torch', 'fastapi', 'numpy', 'gradio', 'pydantic', 'zmq', 'rich', 'typer'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    seconds: list[float] = []
    for _ in range(3):
        started = time.monotonic()
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=child_environment(os.environ)
        )
        seconds.append(time.monotonic() - started)
        assert result.returncode == 0, result.stderr
        assert "causerie serve" in result.stdout
    assert min(seconds) < 0.3


def test_a_folder_that_hides_a_package_is_named(tmp_path: Path) -> None:
    """`python -m serving.cli` from a directory with its own `quant` folder, found before ours."""
    (tmp_path / "ui").mkdir()
    (tmp_path / "ui" / "__init__.py").touch()
    command = [sys.executable, "-m", "serving.cli", "models", "list"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=child_environment(os.environ))
    assert result.returncode == 1
    assert f"{tmp_path / 'ui'} hides our package 'ui'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_packages_found_together_are_no_problem() -> None:
    assert cli.find_shadowed_package() is None
