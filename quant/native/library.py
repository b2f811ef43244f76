"""Builds the C sources beside this file into the user's cache on first use and loads them.

The only place that chooses between AVX-512, with or without products of bf16 pairs, and AVX2. Without a compiler, or on
a processor that has neither, there is no library: callers keep their plain operators, and one log line says why.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

_SOURCES = ("kernels.c", "levels.c", "attention.c", "decode_step.c", "encoder.c", "settling.c")
_HEADERS = ("kernels.h", "attention.h", "vectors.h")
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
_BUILD_TIMEOUT_S = 300  # on a machine that is busy with something else
_CPU_FACTS = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class _Level:
    """Instructions that one build uses: what the processor must have, what torch's cap must allow."""

    capability: str
    cpu_flags: frozenset[str]
    compiler_flags: tuple[str, ...]


_AVX512_CPU = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "fma", "f16c"})
_AVX512_COMPILER = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c")


class Level(Enum):
    """Fastest first."""

    AVX512_BF16 = _Level("AVX512", _AVX512_CPU | {"avx512_bf16"}, (*_AVX512_COMPILER, "-mavx512bf16"))
    AVX512 = _Level("AVX512", _AVX512_CPU, _AVX512_COMPILER)
    AVX2 = _Level("AVX2", frozenset({"avx2", "fma", "f16c"}), ("-mavx2", "-mfma", "-mf16c"))


class NativeUnavailableError(Exception):
    """The message is the reason, as one word of a log line."""


@cache
def load_library() -> ctypes.CDLL | None:
    """The library for this processor, or None; logs once which. The first call on a machine compiles for seconds."""
    try:
        level = choose_level(_cpu_flags(), _capability())
        path = build(level, cache_directory())
        library = ctypes.CDLL(str(path))
    except (NativeUnavailableError, OSError) as error:
        logger.info("native_kernels available=no reason=%s", str(error).replace(" ", "_"))
        return None
    logger.info("native_kernels available=yes level=%s file=%s", level.name, path.name)
    return library


def choose_level(cpu_flags: frozenset[str], capability: str) -> Level:
    """`capability`: as torch calls it. Raises NativeUnavailableError."""
    capped = [level for level in Level if capability == "AVX512" or level.value.capability == capability]
    for level in capped:
        if level.value.cpu_flags <= cpu_flags:
            return level
    raise NativeUnavailableError(f"no kernels for cpu capability {capability}")


def cache_directory() -> Path:
    """Beside torch's own: compiled files belong to the machine, not to the models' cache, which may be shared."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "causerie-native"


def build(level: Level, directory: Path) -> Path:
    """The shared library for `level` in `directory`, compiled unless it is there. Raises NativeUnavailableError.

    Its name holds a digest of sources, compiler and flags. It appears whole or not at all: processes may race.
    """
    compiler = _find_compiler()
    flags = (*_FLAGS, *level.value.compiler_flags)
    path = directory / f"kernels-{_digest(compiler, flags)}.so"
    if path.exists():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        made = Path(temporary) / path.name
        command = [compiler, *flags, *(str(here / name) for name in _SOURCES), "-o", str(made), "-lpthread", "-lm"]
        run = _run(command)
        if run.returncode != 0:
            logger.debug("native_build_failed output=%s", run.stderr[-2000:])
            raise NativeUnavailableError(f"compiler failed with {run.returncode}")
        made.replace(path)
    return path


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"compiler failed {type(error).__name__}") from error


def _find_compiler() -> str:
    for name in _COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    raise NativeUnavailableError("no compiler found")


def _digest(compiler: str, flags: tuple[str, ...]) -> str:
    version = _run([compiler, "--version"]).stdout
    digest = hashlib.sha256("\0".join((version, sys.platform, *flags)).encode())
    here = Path(__file__).parent
    for name in (*_SOURCES, *_HEADERS):
        digest.update((here / name).read_bytes())
    return digest.hexdigest()[:24]


def _capability() -> str:
    """What ATEN_CPU_CAPABILITY caps torch at, without torch: the gateway's process has none."""
    return os.environ.get("ATEN_CPU_CAPABILITY", "avx512").upper()


def _cpu_flags() -> frozenset[str]:
    try:
        lines = _CPU_FACTS.read_text().splitlines()
    except OSError as error:
        raise NativeUnavailableError("processor flags unknown") from error
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return frozenset(flags.split())
