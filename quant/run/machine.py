"""What this machine has free, and how fast it is at the operations that a quantisation consists of."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from quant.method.settling import fastest_settling
from quant.walk.quantize_model import fast_product_dtype

_RATE_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class Rates:
    """Of this machine, all threads together, per second: multiply-adds count twice."""

    fast_flops: float
    float32_flops: float
    step_bytes: float
    operation_seconds: float


# For plans of memory and disk alone, which need no rates.
NO_RATES: Final = Rates(1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Machine:
    """free_disk_bytes:  where the result goes
    has_native_steps: whether GPTQ's steps from input to input run in C
    """

    free_memory_bytes: int
    free_disk_bytes: int
    threads: int
    rates: Rates
    has_native_steps: bool = True


def this_machine(out: Path, *, rates: Rates | None = None) -> Machine:
    """Takes a fifth of a second to measure rates if none are given. `out` need not exist."""
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    return Machine(
        free_memory_bytes=free_memory_bytes(),
        free_disk_bytes=shutil.disk_usage(existing).free,
        threads=torch.get_num_threads(),
        rates=rates or measure_rates(time.perf_counter),
        has_native_steps=fastest_settling().name == "native",
    )


def free_memory_bytes() -> int:
    """What the system could give to this process now, by its own account; all of its memory where it keeps none."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure_rates(clock: Callable[[], float]) -> Rates:
    rows, fast = torch.ones((1024, 1024)), fast_product_dtype()
    low, step, small = rows.to(fast), torch.ones((512, 512)), torch.ones(16)
    threads = torch.get_num_threads()
    product = 2.0 * rows.shape[0] ** 3
    step_bytes = 2.0 * step.numel() * step.element_size()
    return Rates(
        fast_flops=product / _seconds_each(lambda: low @ low, clock),
        float32_flops=product / _seconds_each(lambda: rows @ rows, clock),
        step_bytes=threads * step_bytes / _seconds_each(lambda: step.mul_(1.0), clock),
        operation_seconds=_seconds_each(lambda: small.mul_(1.0), clock),
    )


def _seconds_each(work: Callable[[], object], clock: Callable[[], float]) -> float:
    work()
    started, rounds = clock(), 0
    while True:
        work()
        rounds += 1
        elapsed = clock() - started
        if elapsed >= _RATE_SECONDS:
            return elapsed / rounds
