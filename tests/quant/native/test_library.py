"""Building and choosing the native library: by flags and cap, once, whole or not at all."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from quant.native import library
from quant.native.library import Level, NativeUnavailableError, build, choose_level

pytestmark = pytest.mark.unit

AVX2_FLAGS = Level.AVX2.value.cpu_flags
ALL_FLAGS = AVX2_FLAGS | Level.AVX512_BF16.value.cpu_flags

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in library._COMPILERS), reason="no compiler on this machine"
)


@pytest.mark.parametrize(
    ("flags", "capability", "level"),
    [
        (ALL_FLAGS, "AVX512", Level.AVX512_BF16),
        (ALL_FLAGS - {"avx512_bf16"}, "AVX512", Level.AVX512),
        (ALL_FLAGS, "AVX2", Level.AVX2),  # ATEN_CPU_CAPABILITY=avx2
        (ALL_FLAGS - {"avx512_vnni"}, "AVX512", Level.AVX2),
        (AVX2_FLAGS, "AVX2", Level.AVX2),
    ],
)
def test_level_is_the_fastest_that_processor_and_cap_allow(
    flags: frozenset[str], capability: str, level: Level
) -> None:
    assert choose_level(flags, capability) is level


@pytest.mark.parametrize(
    ("flags", "capability"), [(ALL_FLAGS, "DEFAULT"), (AVX2_FLAGS - {"f16c"}, "AVX2"), (ALL_FLAGS, "ZVECTOR")]
)
def test_other_processors_have_no_kernels(flags: frozenset[str], capability: str) -> None:
    with pytest.raises(NativeUnavailableError, match=capability):
        choose_level(flags, capability)


def write_compiler(path: Path, body: str) -> str:
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo 1; exit 0; fi\n{body}\n')
    path.chmod(0o755)
    return str(path)


COPY_LAST_OUTPUT = """while [ "$1" != -o ]; do shift; done
echo built >> {log}
echo library > "$2"
"""


def test_second_process_takes_what_the_first_has_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    compiler = write_compiler(tmp_path / "cc", COPY_LAST_OUTPUT.format(log=log))
    monkeypatch.setattr(library, "_find_compiler", lambda: compiler)
    threads = [threading.Thread(target=build, args=(Level.AVX2, tmp_path / "cache")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    path = build(Level.AVX2, tmp_path / "cache")
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [path.name]
    assert path.read_text() == "library\n"
    num_built = len(log.read_text().splitlines())
    assert build(Level.AVX2, tmp_path / "cache") == path
    assert len(log.read_text().splitlines()) == num_built
    assert build(Level.AVX512, tmp_path / "cache") != path


def test_failed_build_is_a_reason_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = write_compiler(tmp_path / "cc", "exit 3")
    monkeypatch.setattr(library, "_find_compiler", lambda: compiler)
    with pytest.raises(NativeUnavailableError, match="failed with 3"):
        build(Level.AVX2, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_machine_without_compiler_has_no_library_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="quant.native.library")

    def find_none(_name: str) -> None:
        return None

    monkeypatch.setattr(library.shutil, "which", find_none)
    assert library.load_library.__wrapped__() is None
    (record,) = caplog.records
    assert record.message.startswith("native_kernels available=no reason=no_")
