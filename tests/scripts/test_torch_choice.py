from __future__ import annotations

from pathlib import Path

import pytest

from bootstrap.pip import Pip
from bootstrap.problems import SetupError
from bootstrap.torch_choice import (
    CPU_INDEX,
    CUDA_DOWNLOAD_MB,
    TorchChoice,
    choose_torch,
    cpu_index,
    has_nvidia_driver,
)
from tests.scripts.fake_pip import FakePip, Report, Source, make_fake_pip, package

pytestmark = pytest.mark.unit

REQUIREMENT = "torch>=2.11,<2.14"
CUDA_LINE = 'nvidia-cudnn-cu13==9.20.0.48; platform_system == "Linux"'
WITH_CUDA: Report = [package("torch", "2.13.0", (CUDA_LINE,)), package("nvidia-cublas"), package("triton")]
MAC: Report = [package("torch", "2.13.0", (CUDA_LINE,)), package("sympy")]
CPU_BUILD: Report = [package("torch", "2.13.0+cpu", ("sympy",))]
CUDA_BUILD: Report = [package("torch", "2.13.0+cu130", ("sympy",))]


@pytest.fixture
def pip(tmp_path: Path) -> FakePip:
    return make_fake_pip(tmp_path / "venv")


def choose(pip: FakePip, answers: dict[Source, Report], *, has_driver: bool = False) -> TorchChoice:
    pip.answer(answers)
    return choose_torch(REQUIREMENT, Pip(pip.python), has_driver=has_driver, index=CPU_INDEX)


def test_usual_build_without_cuda_is_taken_as_it_is(pip: FakePip) -> None:
    assert choose(pip, {"usual": CPU_BUILD}).pip_arguments == ("torch==2.13.0+cpu",)


def test_mac_wheel_that_names_cuda_for_linux_only_is_taken_as_it_is(pip: FakePip) -> None:
    assert choose(pip, {"usual": MAC, "cpu_index": CPU_BUILD}).pip_arguments == ("torch==2.13.0",)


def test_cuda_is_taken_where_there_is_a_driver(pip: FakePip) -> None:
    choice = choose(pip, {"usual": WITH_CUDA, "cpu_index": CPU_BUILD}, has_driver=True)
    assert choice.pip_arguments == ("torch==2.13.0",)
    assert choice.download_mb == CUDA_DOWNLOAD_MB


def test_cpu_index_is_taken_and_said_where_there_is_no_driver(pip: FakePip) -> None:
    choice = choose(pip, {"usual": WITH_CUDA, "cpu_index": CPU_BUILD, "no_index": CPU_BUILD})
    assert choice.pip_arguments == ("--no-deps", "--index-url", CPU_INDEX, "torch==2.13.0+cpu")
    assert CPU_INDEX in choice.reason
    assert "no NVIDIA driver" in choice.reason


def test_cpu_build_known_to_pip_is_taken_when_the_index_is_out_of_reach(pip: FakePip) -> None:
    choice = choose(pip, {"usual": WITH_CUDA, "no_index": CPU_BUILD})
    assert choice.pip_arguments == ("--no-deps", "--no-index", "torch==2.13.0+cpu")


@pytest.mark.parametrize("offered", [CUDA_BUILD, [package("torch", "2.13.0", (CUDA_LINE,))], []])
def test_index_that_offers_no_cpu_build_is_passed_over(pip: FakePip, offered: Report) -> None:
    choice = choose(pip, {"usual": WITH_CUDA, "cpu_index": offered})
    assert choice.pip_arguments == ("torch==2.13.0",)


def test_fallback_names_its_size(pip: FakePip) -> None:
    choice = choose(pip, {"usual": WITH_CUDA})
    assert choice.pip_arguments == ("torch==2.13.0",)
    assert f"{CUDA_DOWNLOAD_MB:,} MB" in choice.reason
    assert CPU_INDEX in choice.reason


def test_torch_that_is_installed_already_stays(pip: FakePip) -> None:
    assert choose(pip, {"usual": []}).pip_arguments == (REQUIREMENT,)


def test_no_index_at_all_is_an_error_with_pips_word_and_a_cure(pip: FakePip) -> None:
    with pytest.raises(SetupError) as caught:
        choose(pip, {})
    assert "No matching distribution found" in caught.value.problem.what
    assert "HTTPS_PROXY" in caught.value.problem.cure


def test_looking_installs_nothing(pip: FakePip) -> None:
    choose(pip, {"usual": WITH_CUDA})
    assert pip.installs() == []


def test_index_can_be_set_by_the_environment() -> None:
    assert cpu_index({}) == CPU_INDEX
    assert cpu_index({"CAUSERIE_TORCH_INDEX": ""}) == CPU_INDEX
    assert cpu_index({"CAUSERIE_TORCH_INDEX": "http://127.0.0.1:9/whl"}) == "http://127.0.0.1:9/whl"


def test_driver_is_seen_by_its_folder_or_its_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not has_nvidia_driver(tmp_path / "nvidia")
    (tmp_path / "nvidia").mkdir()
    assert has_nvidia_driver(tmp_path / "nvidia")
    program = tmp_path / "nvidia-smi"
    program.touch(mode=0o755)
    assert has_nvidia_driver(tmp_path / "nothing")
