from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.pausing import awake, paused
from benchmarks.peer_http import filler
from benchmarks.peer_setup import LlamaCpp, PeerUnavailableError, make_llama_cpp, run
from benchmarks.peers import GROUPS, _parse, our_environment

pytestmark = pytest.mark.unit


def test_everything_is_measured_unless_groups_are_chosen() -> None:
    assert _parse([]).only == GROUPS
    assert _parse(["--only", "decode,first-token"]).only == ("decode", "first-token")


@pytest.mark.parametrize("argv", [["--only", "decod"], ["--isa", "avx2", "--only", "prefill"]])
def test_groups_that_do_not_exist_here_are_refused_by_name(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parse(argv)
    assert argv[-1] in capsys.readouterr().err


def test_cap_reaches_our_engine_through_its_environment() -> None:
    assert our_environment(2, "avx2")["ATEN_CPU_CAPABILITY"] == "avx2"
    assert our_environment(2, "native").get("ATEN_CPU_CAPABILITY") == os.environ.get("ATEN_CPU_CAPABILITY")
    assert our_environment(3, "native")["OMP_NUM_THREADS"] == "3"


def test_given_folder_without_the_binaries_makes_the_peer_unavailable(tmp_path: Path) -> None:
    with pytest.raises(PeerUnavailableError, match="llama-server"):
        make_llama_cpp(tmp_path, "native", tmp_path, tmp_path / "model.gguf")
    for name in ("llama-server", "llama-bench"):
        (tmp_path / name).touch()
    found = make_llama_cpp(tmp_path, "native", tmp_path, tmp_path / "model.gguf")
    assert found == LlamaCpp(tmp_path / "llama-server", tmp_path / "llama-bench", tmp_path / "model.gguf")


def test_command_that_fails_makes_the_peer_unavailable_with_its_last_words() -> None:
    with pytest.raises(PeerUnavailableError, match="no matching distribution"):
        run([sys.executable, "-c", "raise SystemExit('no matching distribution')"])
    with pytest.raises(PeerUnavailableError):
        run(["no-such-program-at-all"])


def test_filler_differs_from_its_first_word_on() -> None:
    assert len(filler(200, "a").split()) == 200
    assert filler(200, "a") == filler(200, "a")
    assert filler(200, "a")[:40] != filler(200, "b")[:40]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_process_runs_only_while_it_is_awake() -> None:
    def state() -> str:
        return Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]

    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with paused(process.pid):
        os.waitpid(process.pid, os.WUNTRACED)
        assert state() == "T"
        with awake(process.pid, settle_s=0):
            assert state() != "T"
        os.waitpid(process.pid, os.WUNTRACED)
        assert state() == "T"
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(timeout=10) == 0
