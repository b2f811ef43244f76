"""The Dockerfile without a container engine: every path, command, setting and route that it names exists."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest

from serving.cli import COMMANDS
from serving.config import settings

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """(keyword, rest) in order, continuation lines joined, comments left out."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in joined.splitlines()]


def values(instructions: list[tuple[str, str]], keyword: str) -> list[str]:
    return [rest for found, rest in instructions if found == keyword]


def test_everything_copied_exists_and_is_sent_to_the_builder(instructions: list[tuple[str, str]]) -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for copied in values(instructions, "COPY"):
        *sources, _ = copied.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(fnmatch.fnmatch(source, pattern) for pattern in kept), f"{source} is not sent to the builder"


def test_every_package_of_the_distribution_is_copied(instructions: list[tuple[str, str]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {name.split(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    copied = {source for line in values(instructions, "COPY") for source in line.split()[:-1]}
    assert packages <= copied
    assert set(project["project"]["license-files"]) <= copied
    assert project["project"]["readme"] in copied


def test_it_installs_the_torch_that_the_project_asks_for(instructions: list[tuple[str, str]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (requirement,) = [line for line in project["project"]["dependencies"] if line.startswith("torch")]
    (torch,) = [line for line in values(instructions, "RUN") if "torch" in line]
    assert f'"{requirement}"' in torch
    (argument,) = values(instructions, "ARG")
    assert argument == "TORCH_INDEX=https://download.pytorch.org/whl/cpu"
    assert '--index-url "$TORCH_INDEX"' in torch


def test_it_runs_a_command_that_exists(instructions: list[tuple[str, str]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (entry,) = values(instructions, "ENTRYPOINT")
    (arguments,) = values(instructions, "CMD")
    assert json.loads(entry)[0] in project["project"]["scripts"]
    assert " ".join(json.loads(arguments)) in COMMANDS


def test_its_settings_exist(instructions: list[tuple[str, str]]) -> None:
    known = {setting.variable for setting in settings()} | {"CAUSERIE_CACHE"}
    named = {pair.partition("=")[0] for line in values(instructions, "ENV") for pair in line.split()}
    assert named <= known


def test_it_does_not_run_as_root(instructions: list[tuple[str, str]]) -> None:
    (user,) = values(instructions, "USER")
    assert f" {user} " in "".join(f"{line} " for line in values(instructions, "RUN") if "useradd" in line)
    keywords = [keyword for keyword, _ in instructions]
    assert keywords.index("USER") < keywords.index("ENTRYPOINT")
    assert user not in ("root", "0")


def test_model_lies_in_a_volume_that_its_user_owns(instructions: list[tuple[str, str]]) -> None:
    (volume,) = values(instructions, "VOLUME")
    assert f"CAUSERIE_CACHE={volume}" in values(instructions, "ENV")[0]
    assert any(f"--owner=causerie --group=causerie {volume}" in line for line in values(instructions, "RUN"))


def test_health_check_asks_a_route_that_exists_on_the_port_that_is_served(instructions: list[tuple[str, str]]) -> None:
    (check,) = values(instructions, "HEALTHCHECK")
    program, flag, code = json.loads(check[check.index("[") :])
    assert (program, flag) == ("python", "-c")
    compile(code, "HEALTHCHECK", "exec")
    found = re.search(r"127\.0\.0\.1:(\d+)(/[\w/]+)", code)
    assert found is not None
    assert [found[1]] == values(instructions, "EXPOSE")
    assert f"CAUSERIE_PORT={found[1]}" in values(instructions, "ENV")[0]
    gateway = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "serving" / "gateway").glob("*.py"))
    assert f'"{found[2]}"' in gateway


def test_no_secret_is_built_in(instructions: list[tuple[str, str]]) -> None:
    assert not any("API_KEY" in rest for _, rest in instructions)


@pytest.mark.skipif(not Path("/etc/debian_version").exists(), reason="the image is a Debian one")
def test_programs_it_runs_exist_on_debian(instructions: list[tuple[str, str]]) -> None:
    for line in values(instructions, "RUN"):
        for command in line.split("&&"):
            program = command.split()[0]
            assert program == "pip" or shutil.which(program) or Path("/usr/sbin", program).exists(), program


def test_workflow_runs_the_one_script() -> None:
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    assert re.findall(r"- run: (.*)", workflow) == ["scripts/test"]
