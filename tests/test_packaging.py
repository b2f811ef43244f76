"""The wheel: exactly our packages with their data, and a `causerie` that works from an empty directory."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.server_process import MODEL, PREPARE_TIMEOUT_S, running_server
from tests.test_layout import PACKAGES

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[1]


def files_of_packages() -> Iterator[str]:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: the build backend writes beside what it builds."""
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    # No isolation: setuptools is here already (torch needs it), and a test downloads nothing.
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("causerie-*.whl"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as content:
        return set(content.namelist())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has only the wheel, and sees this one's other packages: no download."""
    environment = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    packages = next(environment.glob("lib/python*/site-packages"))
    # A path in a .pth file is not searched for further .pth files, so an editable install of ours stays out.
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install"]
    subprocess.run([*install, "--no-deps", "--no-index", "--quiet", wheel], check=True)
    return environment / "bin" / "causerie"


def run(program: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def test_wheel_holds_exactly_our_packages(names: set[str]) -> None:
    ours = {name for name in names if ".dist-info/" not in name}
    assert ours == set(files_of_packages())


def test_wheel_holds_the_data_that_the_product_needs(names: set[str]) -> None:
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    for folder, ending in (("moderation/weights/", ".safetensors"), ("quant/data/", ".jsonl"), ("ui/assets/", ".css")):
        assert any(name.startswith(folder) and name.endswith(ending) for name in names), folder
    assert "moderation/weights/report.json" in names


def test_wheel_brings_its_licence_and_little_besides_the_classifiers_weights(names: set[str], wheel: Path) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    weights = sum(file.stat().st_size for file in (ROOT / "moderation/weights").rglob("*.safetensors"))
    assert weights < 30e6
    assert wheel.stat().st_size < weights + 8e6


def test_installed_command_helps_from_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    helped = run(installed, "--help", cwd=tmp_path)
    assert helped.returncode == 0, helped.stderr
    assert helped.stdout.startswith("usage: causerie")


@pytest.mark.parametrize("arguments", [("serve", "--print-config"), ("models", "list"), ("quantize", "--help")])
def test_installed_command_finds_its_parts(installed: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run(installed, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_installed_classifier_finds_its_weights(installed: Path, tmp_path: Path) -> None:
    judged = run(installed, "moderate", "how do I kill a Python process", cwd=tmp_path)
    assert judged.returncode == 0, judged.stderr


def test_installed_server_answers_from_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    with running_server(program=installed, cwd=tmp_path) as server:
        server.wait_for_line("ready", PREPARE_TIMEOUT_S)
        with server.client() as client:
            assert client.get("/").status_code == 200
            question = {"role": "user", "content": "Say hello."}
            asked = {"model": MODEL, "messages": [question], "max_tokens": 4}
            answer = client.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] > 0
    assert list(tmp_path.iterdir()) == []


def test_folder_of_our_name_in_the_current_directory_does_no_harm(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "serving").mkdir()
    (tmp_path / "serving" / "__init__.py").write_text("raise SystemExit('shadowed')")
    assert run(installed, "models", "list", cwd=tmp_path).returncode == 0
