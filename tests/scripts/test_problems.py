from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from bootstrap.problems import check_disk, check_port, check_proxy, check_python, check_writable

pytestmark = pytest.mark.unit


def test_old_python_is_named_with_what_is_needed() -> None:
    problem = check_python((3, 9), lambda _: True)
    assert problem is not None
    assert "3.9" in problem.what
    assert "3.11" in problem.what


def test_python_without_ensurepip_names_the_debian_package() -> None:
    problem = check_python((3, 12), lambda name: name != "ensurepip")
    assert problem is not None
    assert "python3.12-venv" in problem.cure


def test_sufficient_python_is_no_problem() -> None:
    assert check_python((3, 11), lambda _: True) is None


def test_too_little_disk_gives_both_numbers() -> None:
    problem = check_disk(Path("/data"), needed_mb=2_000, free_mb=500)
    assert problem is not None
    assert "500 MB" in problem.what
    assert "2,000 MB" in problem.what
    assert check_disk(Path("/data"), needed_mb=2_000, free_mb=2_000) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_taken_port_names_another(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as taken:
        taken.bind((host, 0))
        taken.listen()
        port: int = taken.getsockname()[1]
        problem = check_port(host, port)
        assert problem is not None
        assert f"--port {port + 1}" in problem.cure
    assert check_port(host, port) is None


def test_host_that_is_no_address_is_left_to_the_server() -> None:
    assert check_port("256.0.0.1", 8000) is None


def test_folder_to_be_made_in_a_writable_one_is_no_problem(tmp_path: Path) -> None:
    assert check_writable(tmp_path / "a" / "b", "cure") is None


def test_read_only_home_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write everywhere, so the answer is put in the mouth of the operating system.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    problem = check_writable(tmp_path / ".cache", "cure")
    assert problem is not None
    assert str(tmp_path) in problem.what


def test_folder_below_a_file_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    problem = check_writable(tmp_path / "file" / "cache", "name another")
    assert problem is not None
    assert problem.cure == "name another"


def refuse(host: str, port: int) -> None:
    raise ConnectionRefusedError(111, "Connection refused")


def test_no_proxy_is_not_asked() -> None:
    assert check_proxy({"HTTPS_PROXY": ""}, refuse) is None


def test_proxy_that_does_not_answer_is_named_without_its_password() -> None:
    problem = check_proxy({"https_proxy": "http://ann:secret@proxy.example:3128"}, refuse)
    assert problem is not None
    assert "proxy.example:3128" in problem.what
    assert "https_proxy" in problem.cure
    assert "secret" not in str(problem)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("http://proxy.example:3128", ("proxy.example", 3128)),
        ("proxy.example:3128", ("proxy.example", 3128)),
        ("https://proxy.example", ("proxy.example", 443)),
        ("http://proxy.example", ("proxy.example", 80)),
    ],
)
def test_proxy_that_answers_is_no_problem(value: str, expected: tuple[str, int]) -> None:
    asked: list[tuple[str, int]] = []
    assert check_proxy({"HTTPS_PROXY": value}, lambda host, port: asked.append((host, port))) is None
    assert asked == [expected]


@pytest.mark.parametrize("value", ["http://", "http://proxy.example:port"])
def test_malformed_proxy_is_a_problem(value: str) -> None:
    assert check_proxy({"HTTPS_PROXY": value}, lambda host, port: None) is not None
