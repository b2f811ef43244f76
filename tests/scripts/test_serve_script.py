"""scripts/serve as a user types it, against a copy of the scripts and a fake pip, and its parts by themselves."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bootstrap import serve
from bootstrap.environment import Environment
from bootstrap.plan import Step, render
from bootstrap.serve import Target, model_step, read_target
from serving.models import DEFAULT_MODEL, NAMED_MODELS, cache_directory
from tests.scripts.fake_pip import FakePip, make_fake_pip, package

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "a clone"  # with a space: quoting has to hold
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


@pytest.fixture
def pip(checkout: Path) -> FakePip:
    """Its `causerie` prints what it was given."""
    fake = make_fake_pip(checkout / ".venv")
    (fake.home / "pyvenv.cfg").write_text("version = 3.11.7\n")
    fake.answer({"usual": [package("torch", "2.13.0+cpu")]})
    causerie = fake.home / "bin" / "causerie"
    causerie.write_text('#!/bin/sh\necho "$PWD"\nfor argument in "$@"; do echo "<$argument>"; done\n')
    causerie.chmod(0o755)
    return fake


def run(checkout: Path, *arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(checkout), **variables}
    command = [checkout / "scripts" / "serve", *arguments]
    return subprocess.run(
        command, cwd=cwd or checkout, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


@pytest.mark.system
def test_first_start_prints_its_plan_before_it_does_anything(checkout: Path, pip: FakePip) -> None:
    started = run(checkout, "--port", "0")
    assert started.returncode == 0, started.stderr
    plan, done = started.stderr.index("1. make a virtual"), started.stderr.index("- PyTorch:")
    assert plan < started.stderr.index("5. serve http://127.0.0.1:0/") < done
    assert "MB to download" in started.stderr
    assert "min" in started.stderr


@pytest.mark.system
def test_arguments_and_folder_reach_the_server_as_typed(checkout: Path, pip: FakePip, tmp_path: Path) -> None:
    started = run(checkout, "--port", "0", "--model", "./my model", "--exact", cwd=tmp_path)
    assert started.stdout.splitlines() == [
        str(tmp_path),
        *("<serve>", "<--port>", "<0>", "<--model>", "<./my model>", "<--exact>"),
    ]


@pytest.mark.system
def test_second_start_reuses_everything_within_a_second(checkout: Path, pip: FakePip) -> None:
    run(checkout, "--port", "0")
    calls = (pip.home / "calls.jsonl").read_text()
    durations: list[float] = []
    for _ in range(3):  # the best of three: this machine may be busy with something else
        begun = time.monotonic()
        again = run(checkout, "--port", "0")
        durations.append(time.monotonic() - begun)
        assert again.stderr == ""
        assert "<serve>" in again.stdout
    assert (pip.home / "calls.jsonl").read_text() == calls
    assert min(durations) < 1


@pytest.mark.system
def test_failed_start_says_what_to_do_and_the_next_goes_on(checkout: Path, pip: FakePip) -> None:
    torch = [package("torch", "2.13.0+cpu")]
    pip.answer({"usual": torch}, fails=("--editable",))
    failed = run(checkout, "--port", "0")
    assert failed.returncode == 1
    assert "Cure:" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert failed.stdout == ""
    pip.answer({"usual": torch})
    assert "<serve>" in run(checkout, "--port", "0").stdout


@pytest.mark.system
def test_ctrl_c_while_pip_installs_ends_quietly_and_the_next_start_goes_on(checkout: Path, pip: FakePip) -> None:
    installing = pip.hang()
    # A shell starts what runs in its background with SIGINT ignored; at a terminal it is not.
    heeding = "import os, sys; from signal import *; signal(SIGINT, SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    with subprocess.Popen(
        [sys.executable, "-c", heeding, checkout / "scripts" / "serve", "--port", "0"],
        cwd=checkout,
        env={"PATH": os.environ["PATH"], "HOME": str(checkout)},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as started:
        try:
            assert installing.read_text() == "installing"
            os.killpg(started.pid, signal.SIGINT)  # as a terminal does: to pip as well
            _, told = started.communicate(timeout=30)
        finally:
            started.kill()
    assert started.returncode == 130
    assert told.endswith("Stopped. Run scripts/serve again: it goes on from here.\n")
    installing.unlink()
    assert "<serve>" in run(checkout, "--port", "0").stdout


@pytest.mark.system
def test_taken_port_stops_the_first_start_before_any_pip(checkout: Path, pip: FakePip) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refused = run(checkout, CAUSERIE_PORT=str(taken.getsockname()[1]))
    assert refused.returncode == 1
    assert "is in use" in refused.stderr
    assert "Cure: stop that program" in refused.stderr
    assert (pip.home / "calls.jsonl").read_text() == ""


@pytest.mark.system
def test_all_problems_are_told_at_once(checkout: Path, pip: FakePip, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = run(checkout, "--port", "0", CAUSERIE_CACHE=str(tmp_path / "file" / "cache"), HTTPS_PROXY="http://")
    assert "CAUSERIE_CACHE=/path" in refused.stderr
    assert "HTTPS_PROXY names no host" in refused.stderr


@pytest.mark.system
def test_help_before_the_set_up_installs_nothing(checkout: Path, pip: FakePip) -> None:
    helped = run(checkout, "--help")
    assert helped.returncode == 0
    assert helped.stdout.startswith("usage: scripts/serve")
    assert (pip.home / "calls.jsonl").read_text() == ""


@pytest.mark.system
def test_no_python_new_enough_is_an_error_with_a_cure(checkout: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    for name in ("python3", "python"):
        (old / name).write_text("#!/bin/sh\nexit 1\n")
        (old / name).chmod(0o755)
    for name in ("dirname", "sh"):
        program = shutil.which(name)
        assert program is not None
        (old / name).symlink_to(program)
    refused = run(checkout, PATH=str(old))
    assert refused.returncode == 1
    assert "Python 3.11 or newer" in refused.stderr
    assert "PYTHON=/path/to/python3" in refused.stderr


@pytest.mark.system
def test_half_made_environment_is_made_anew(checkout: Path) -> None:
    from bootstrap.environment import make_venv

    environment = Environment(checkout, checkout / ".venv")
    environment.directory.mkdir()
    (environment.directory / "pyvenv.cfg").write_text("version = 3.11.7\n")
    pip = make_venv(environment)
    assert pip.version() is not None


@pytest.mark.unit
@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        ([], {}, ("127.0.0.1", 8000)),
        (["--port", "9001"], {"CAUSERIE_PORT": "9002"}, ("127.0.0.1", 9001)),
        (["--port=9001", "--exact"], {}, ("127.0.0.1", 9001)),
        ([], {"CAUSERIE_PORT": "9002", "CAUSERIE_HOST": "0.0.0.0"}, ("0.0.0.0", 9002)),
        (["--port", "many"], {}, ("127.0.0.1", 8000)),
        (["--port"], {}, ("127.0.0.1", 8000)),
        (["--config", "/nowhere.toml"], {}, ("127.0.0.1", 8000)),
    ],
)
def test_address_is_read_as_the_server_will(
    arguments: list[str], variables: dict[str, str], expected: tuple[str, int]
) -> None:
    target = read_target(arguments, variables)
    assert (target.host, target.port) == expected


@pytest.mark.unit
def test_address_is_read_from_the_configuration_file_too(tmp_path: Path) -> None:
    (tmp_path / "causerie.toml").write_text('port = 9003\nmodel = "qwen3-8b"\n')
    target = read_target(["--config", str(tmp_path / "causerie.toml")], {})
    assert (target.port, target.model) == (9003, "qwen3-8b")


@pytest.mark.unit
@pytest.mark.parametrize("flag", ["--print-config", "--help", "-h"])
def test_what_only_shows_something_needs_no_port(flag: str) -> None:
    assert read_target([flag], {}).only_shows_something


@pytest.mark.unit
def test_prepared_model_is_reused_in_the_plan(tmp_path: Path) -> None:
    target = Target(DEFAULT_MODEL, "127.0.0.1", 8000, only_shows_something=False)
    assert model_step(target, tmp_path).download_mb == serve.MODEL_DOWNLOAD_MB
    prepared = tmp_path / DEFAULT_MODEL / "gptq-0123456789ab"
    prepared.mkdir(parents=True)
    (prepared / "causerie.json").touch()
    assert model_step(target, tmp_path).download_mb == 0


@pytest.mark.unit
def test_what_the_set_up_repeats_of_the_product_is_still_true(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot import the product, which is not installed yet."""
    default = next(named for named in NAMED_MODELS if named.name == DEFAULT_MODEL)
    assert default.name == serve.DEFAULT_MODEL
    assert round(default.download_bytes / 1e6) == serve.MODEL_DOWNLOAD_MB
    monkeypatch.setenv("HOME", "/home/ann")
    for variables in ({}, {"XDG_CACHE_HOME": "/x"}, {"CAUSERIE_CACHE": "~/c", "XDG_CACHE_HOME": "/x"}):
        assert serve.cache_directory(variables) == cache_directory(variables)


@pytest.mark.unit
def test_plan_adds_up_and_is_numbered() -> None:
    shown = render("First:", [Step("one", 100, 300, 1), Step("two", 275, 0, 0.5), Step("three", memo="at last")])
    lines = shown.splitlines()
    assert lines[1].startswith("  1. one ")
    assert lines[3].endswith("at last")
    assert "375 MB to download, 300 MB on disk, about 2 min" in lines[-1]
