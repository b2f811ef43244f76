from __future__ import annotations

from pathlib import Path

import pytest

from bootstrap.environment import Environment, install, make_venv, only_one_at_a_time, remove_half_installed
from bootstrap.problems import SetupError
from tests.scripts.fake_pip import FakePip, make_fake_pip, package

pytestmark = pytest.mark.unit

PYPROJECT = '[project]\nname = "causerie"\ndependencies = ["numpy", "torch>=2.11,<2.14"]\n'


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    return Environment(tmp_path, tmp_path / ".venv")


@pytest.fixture
def pip(environment: Environment) -> FakePip:
    """In a virtual environment that stands: as a first step that was finished leaves it."""
    fake = make_fake_pip(environment.directory)
    (environment.directory / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.11.7\n")
    fake.answer({"usual": [package("torch", "2.13.0+cpu")]})
    return fake


def silent(_: str) -> None:
    pass


def test_nothing_is_ready_before_the_first_installation(environment: Environment) -> None:
    assert not environment.is_ready(())


def test_installs_torch_first_then_the_project_then_stamps(environment: Environment, pip: FakePip) -> None:
    install(environment, (), {}, silent)
    assert pip.installs() == [["torch==2.13.0+cpu"], ["--editable", str(environment.root)]]
    assert environment.is_ready(())


def test_second_start_runs_no_pip(environment: Environment, pip: FakePip) -> None:
    install(environment, (), {}, silent)
    calls = (pip.home / "calls.jsonl").read_text()
    install(environment, (), {}, silent)
    assert (pip.home / "calls.jsonl").read_text() == calls


def test_environment_with_extras_serves_a_start_without(environment: Environment, pip: FakePip) -> None:
    install(environment, ("dev",), {}, silent)
    assert pip.installs()[-1] == ["--editable", f"{environment.root}[dev]"]
    assert environment.is_ready(())


def test_environment_without_extras_does_not_serve_a_start_with(environment: Environment, pip: FakePip) -> None:
    install(environment, (), {}, silent)
    assert not environment.is_ready(("dev",))


def test_changed_pyproject_installs_again(environment: Environment, pip: FakePip) -> None:
    install(environment, (), {}, silent)
    environment.pyproject.write_text(PYPROJECT + "# changed\n")
    assert not environment.is_ready(())


def test_other_python_installs_again(environment: Environment, pip: FakePip) -> None:
    install(environment, (), {}, silent)
    (environment.directory / "pyvenv.cfg").write_text("version = 3.12.1\n")
    assert not environment.is_ready(())


def test_environment_whose_python_is_gone_is_not_ready(environment: Environment, pip: FakePip) -> None:
    install(environment, (), {}, silent)
    pip.python.unlink()
    pip.python.symlink_to("/nowhere/python3")
    assert not environment.is_ready(())


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"pyproject": 1, "python": null, "extras": 3}'])
def test_damaged_stamp_is_not_ready(environment: Environment, pip: FakePip, content: str) -> None:
    environment.stamp.write_text(content)
    assert not environment.is_ready(())


def test_interrupted_installation_leaves_no_stamp_and_the_next_goes_on(environment: Environment, pip: FakePip) -> None:
    torch = [package("torch", "2.13.0+cpu")]
    pip.answer({"usual": torch}, fails=("--editable",))
    with pytest.raises(SetupError, match="could not install Causerie") as caught:
        install(environment, (), {}, silent)
    assert "goes on from here" in caught.value.problem.cure
    assert not environment.is_ready(())
    pip.answer({"usual": torch})
    install(environment, (), {}, silent)
    assert environment.is_ready(())


def test_failed_reinstallation_does_not_leave_the_old_stamp(environment: Environment, pip: FakePip) -> None:
    install(environment, (), {}, silent)
    pip.answer({"usual": [package("torch", "2.13.0+cpu")]}, fails=("--editable",))
    with pytest.raises(SetupError):
        install(environment, ("dev",), {}, silent)
    assert not environment.is_ready(())


def test_environment_that_works_is_kept(environment: Environment, pip: FakePip) -> None:
    make_venv(environment)
    assert pip.python.exists()
    assert pip.home.joinpath("calls.jsonl").exists()


def test_folder_in_the_way_that_cannot_be_made_an_environment_is_an_error(environment: Environment) -> None:
    environment.directory.write_text("a file")
    with pytest.raises(SetupError, match="could not make a virtual environment"):
        make_venv(environment)


def test_package_without_all_its_files_is_forgotten_and_whole_ones_stay(tmp_path: Path) -> None:
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    for name in ("whole", "half", "no_record"):
        metadata = packages / f"{name}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").touch()
        if name != "no_record":
            (metadata / "RECORD").write_text(f"{name}.py,,\n../../../bin/{name},,\n{name}-1.0.dist-info/RECORD,,\n")
    (tmp_path / "bin").mkdir()
    for present in (packages / "whole.py", tmp_path / "bin" / "whole", packages / "half.py"):
        present.touch()
    remove_half_installed(tmp_path)
    assert [path.name for path in packages.glob("*.dist-info")] == ["whole-1.0.dist-info"]


def test_second_of_two_starts_waits_and_says_so(environment: Environment) -> None:
    class WouldWait(Exception):
        pass

    def stop(line: str) -> None:
        assert "waiting for it" in line
        raise WouldWait

    # The lock belongs to the opened file, so one process can stand for two.
    with only_one_at_a_time(environment, silent), pytest.raises(WouldWait), only_one_at_a_time(environment, stop):
        pytest.fail("both hold the lock")
    with only_one_at_a_time(environment, stop):
        pass
