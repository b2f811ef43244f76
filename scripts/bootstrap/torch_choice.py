"""Which build of PyTorch to install, decided by looking at what pip would bring.

On an ordinary Linux machine the default index brings gigabytes of CUDA packages with torch. Where there is no NVIDIA
driver they are dead weight, so a CPU build is looked for first. Called by `environment`; installs nothing.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bootstrap.problems import SetupError

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Measured with torch 2.13 on x86-64 Linux: download, then what it takes unpacked.
CPU_DOWNLOAD_MB, CPU_DISK_MB = 190, 700
CUDA_DOWNLOAD_MB, CUDA_DISK_MB = 2_740, 6_500
_CUDA_PACKAGE = re.compile(r"(nvidia|cuda)[-_]", re.IGNORECASE)
_CUDA_BUILD = re.compile(r"\+(cu|rocm|xpu)")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One package that pip would install. `requires` are its own requirement lines, markers included."""

    name: str
    version: str
    requires: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TorchChoice:
    """What to hand to `pip install`, why, and how large the download is."""

    pip_arguments: tuple[str, ...]
    reason: str
    download_mb: int


class NotResolvedError(Exception):
    """pip finds no answer; the message is pip's last line."""


class Resolver(Protocol):
    def resolve(self, arguments: Sequence[str]) -> list[Candidate]:
        """What `pip install ARGUMENTS` would install, without downloading it. Raises NotResolvedError."""
        ...


def has_nvidia_driver(driver_folder: Path = Path("/proc/driver/nvidia")) -> bool:
    return driver_folder.exists() or shutil.which("nvidia-smi") is not None


def cpu_index(environment: Mapping[str, str]) -> str:
    return environment.get("CAUSERIE_TORCH_INDEX") or CPU_INDEX


def choose_torch(requirement: str, resolver: Resolver, *, has_driver: bool, index: str) -> TorchChoice:
    try:
        usual = resolver.resolve([requirement])
    except NotResolvedError as error:
        raise SetupError(
            f"pip finds no {requirement} for this Python: {error}",
            "check the network (behind a proxy: set HTTPS_PROXY), or try another Python: PYTHON=python3.12",
        ) from error
    if not brings_cuda(usual):
        return TorchChoice(_pinned(usual, requirement), "the usual build has no CUDA in it", CPU_DOWNLOAD_MB)
    if has_driver:
        return TorchChoice(
            _pinned(usual, requirement), "with CUDA: this machine has an NVIDIA driver", CUDA_DOWNLOAD_MB
        )
    # --no-deps: only torch itself comes from there; what it needs comes with the other packages.
    sources = (
        (("--no-deps", "--index-url", index), f"CPU build from {index}: this machine has no NVIDIA driver"),
        (("--no-deps", "--no-index"), "CPU build that pip is configured to find: this machine has no NVIDIA driver"),
    )
    for options, reason in sources:
        try:
            found = resolver.resolve([*options, requirement])
        except NotResolvedError:
            continue
        if found and not requires_cuda(found):
            return TorchChoice((*options, *_pinned(found, requirement)), reason, CPU_DOWNLOAD_MB)
    return TorchChoice(
        _pinned(usual, requirement),
        f"with CUDA, about {CUDA_DOWNLOAD_MB:,} MB: no CPU build could be had from {index}",
        CUDA_DOWNLOAD_MB,
    )


def brings_cuda(candidates: Sequence[Candidate]) -> bool:
    return any(_CUDA_PACKAGE.match(found.name) or _is_cuda_build(found) for found in candidates)


def requires_cuda(candidates: Sequence[Candidate]) -> bool:
    """For a torch looked at with --no-deps: its CUDA packages show only in its requirement lines.

    Those lines are marked for Linux, where alone this is asked: elsewhere the usual build brings no CUDA.
    """
    lines = [line for found in candidates for line in found.requires if "extra ==" not in line]
    return brings_cuda(candidates) or any(_CUDA_PACKAGE.match(line) for line in lines)


def _is_cuda_build(found: Candidate) -> bool:
    return found.name == "torch" and _CUDA_BUILD.search(found.version) is not None


def _pinned(candidates: Sequence[Candidate], requirement: str) -> tuple[str, ...]:
    """The version that was looked at is the one installed; with nothing to install, torch is there already."""
    version = next((candidate.version for candidate in candidates if candidate.name == "torch"), None)
    return (requirement,) if version is None else (f"torch=={version}",)
