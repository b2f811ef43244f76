"""How many compute threads the engine process should use, and the environment that makes them behave.

Read before torch is imported: OpenMP takes its settings from the environment once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["count_physical_cores", "thread_environment"]

_TOPOLOGY = Path("/sys/devices/system/cpu")
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def count_physical_cores() -> int:
    """Physical cores this process may run on: hyper-threads count once, a container's CPU quota is respected."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = {core for cpu in usable if (core := _core_of(cpu)) is not None}
    num_cores = len(cores) or len(usable)
    quota = _cgroup_quota()
    return max(1, min(num_cores, quota) if quota is not None else num_cores)


def thread_environment(compute_threads: int | None, environ: Mapping[str, str]) -> dict[str, str]:
    """OpenMP's settings for the child. What the user has set in the environment stays.

    Workers that spin while the main thread is in Python would take the core that the gateway streams from, so they
    spin briefly, long enough to bridge the gap between two operators of one step, and then sleep.
    """
    threads = str(compute_threads) if compute_threads is not None else environ.get("OMP_NUM_THREADS")
    settings = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1", "TOKENIZERS_PARALLELISM": "false"}
    settings = {name: environ.get(name, value) for name, value in settings.items()}
    settings["OMP_NUM_THREADS"] = threads or str(count_physical_cores())
    return settings


def _core_of(cpu: int) -> tuple[str, str] | None:
    topology = _TOPOLOGY / f"cpu{cpu}" / "topology"
    try:
        return (topology / "physical_package_id").read_text().strip(), (topology / "core_id").read_text().strip()
    except OSError:
        return None


def _cgroup_quota() -> int | None:
    """Whole cores of the quota, rounded up; None without one (cgroup v2 only)."""
    try:
        quota, period = _CGROUP_QUOTA.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(1, -(-int(quota) // int(period)))
