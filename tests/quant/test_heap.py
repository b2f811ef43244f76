from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from quant.heap import large_blocks_given_back

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"),
]
PAGE_BYTES = 4096


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def test_large_tensors_between_small_ones_that_stay_give_their_memory_back() -> None:
    with large_blocks_given_back():
        before = resident_bytes()
        large: list[torch.Tensor] = []
        small: list[torch.Tensor] = []
        for _ in range(12):
            large.append(torch.ones(2 * 10**6))
            small.append(torch.ones(1000))
        assert resident_bytes() > before + 80 * 10**6
        large.clear()
        assert resident_bytes() < before + 10 * 10**6
    assert all(bool((kept == 1).all()) for kept in small)
