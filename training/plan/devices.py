"""Devices that a plan can name: memory, speed and price. Figures of their data sheets, without sparsity."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from training.errors import TrainingError

__all__ = ["DEVICES", "PRICES_AS_OF", "Device", "Fleet", "parse_fleet"]

GIB = 2**30
# What GPU clouds ask for an hour on demand, about the middle; they differ threefold. `--price` says it better.
PRICES_AS_OF = "2025-06"


@dataclass(frozen=True, slots=True)
class Device:
    """operations:  a second, of 16-bit products (float32 for the CPU)
    bandwidth:   bytes a second of its memory
    mfu:         share of `operations` that training is assumed to reach
    per_machine: devices that share a fast link
    link, network: bytes a second that one device sends within its machine, and to other machines
    """

    name: str
    memory_bytes: float
    operations: float
    bandwidth: float
    dollars_per_hour: float
    mfu: float
    per_machine: int
    link: float
    network: float
    compute_bytes: int = 2


@dataclass(frozen=True, slots=True)
class Fleet:
    count: int
    device: Device

    def __str__(self) -> str:
        return f"{self.count} x {self.device.name}"

    @property
    def bandwidth_between(self) -> float:
        """Bytes a second that a device sends to the others, the slowest hop deciding."""
        return self.device.link if self.count <= self.device.per_machine else self.device.network


_ALL = (
    Device("a100-40", 40 * GIB, 312e12, 1555e9, 1.30, 0.40, 8, 300e9, 25e9),
    Device("a100-80", 80 * GIB, 312e12, 2039e9, 1.80, 0.40, 8, 300e9, 25e9),
    Device("h100", 80 * GIB, 989e12, 3350e9, 2.90, 0.35, 8, 450e9, 50e9),
    Device("h200", 140 * GIB, 989e12, 4800e9, 3.80, 0.35, 8, 450e9, 50e9),
    Device("v100-32", 32 * GIB, 125e12, 900e9, 3.06, 0.30, 8, 150e9, 12.5e9),
    Device("l4", 22.5 * GIB, 121e12, 300e9, 0.70, 0.30, 4, 25e9, 3e9),
    Device("4090", 24 * GIB, 165e12, 1008e9, 0.45, 0.35, 4, 25e9, 3e9),
    # A machine of 8 cores with AVX2 and 32 GB.
    Device("cpu", 30 * GIB, 0.5e12, 40e9, 0.40, 0.30, 1, 1e9, 1e9, compute_bytes=4),
)
DEVICES: Mapping[str, Device] = {device.name: device for device in _ALL}


def parse_fleet(text: str) -> Fleet:
    """'512xh100' or 'h100'. Raises TrainingError with the nearest name."""
    found = re.fullmatch(r"(?:(\d+)\s*[x×*]\s*)?([a-z0-9-]+)", text.strip().lower())
    count, name = (int(found[1] or 1), found[2]) if found else (0, text)
    if name not in DEVICES or count < 1:
        close = difflib.get_close_matches(name, DEVICES, n=1)
        hint = f"did you mean {close[0]!r}?" if close and count else f"as in 8xh100; known are {', '.join(DEVICES)}"
        raise TrainingError(f"--gpus {text!r} names no devices; {hint}")
    return Fleet(count, DEVICES[name])
