from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from quant.heap import give_back_free_memory, large_blocks_given_back
from quant.options import QuantizeOptions
from quant.progress import ProgressSink, SilentProgress
from quant.report.measure import RowLogits
from quant.run.calibration import Encoder
from quant.run.quantize_directory import quantize_with
from tests.quant.tiny_models import TinyAccess, write_source

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"),
]
PAGE_BYTES = 4096


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def bytes_left_by_large_tensors() -> int:
    """What stays resident of 240 MB in tensors that came and went between small ones that live on."""
    before = resident_bytes()
    large: list[torch.Tensor] = []
    small: list[torch.Tensor] = []
    for _ in range(12):
        large.append(torch.ones(5 * 10**6))
        small.append(torch.ones(1000))
    assert resident_bytes() > before + 200 * 10**6
    large.clear()
    left = resident_bytes() - before
    assert all(bool((kept == 1).all()) for kept in small)
    return left


def test_large_tensors_between_small_ones_that_stay_give_their_memory_back() -> None:
    with large_blocks_given_back():
        assert bytes_left_by_large_tensors() < 10 * 10**6


def test_gaps_on_the_heap_go_back_when_asked_for() -> None:
    with large_blocks_given_back():
        tensors = [torch.ones(5 * 10**5) for _ in range(60)]  # 2 MB: too small for a map of its own
        full = resident_bytes()
        del tensors[::2]
        assert resident_bytes() > full - 5 * 10**6
        give_back_free_memory()
        assert resident_bytes() < full - 50 * 10**6
    assert all(bool((kept == 1).all()) for kept in tensors)


class LooksAtItsMemory(TinyAccess):
    def __init__(self) -> None:
        super().__init__()
        self.bytes_left: list[int] = []

    def _look(self) -> None:
        self.bytes_left.append(bytes_left_by_large_tensors())

    def encoder(self, directory: Path) -> Encoder:
        self._look()
        return super().encoder(directory)

    def serve_windows(
        self, directory: Path, windows: torch.Tensor, progress: ProgressSink, stage: str
    ) -> RowLogits | None:
        self._look()
        return super().serve_windows(directory, windows, progress, stage)


def test_a_quantisation_gives_large_blocks_back_from_its_first_text_to_its_measuring(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    access = LooksAtItsMemory()
    quantize_with(access, source, tmp_path / "out", QuantizeOptions(samples=8, seq_len=64), SilentProgress())
    assert len(access.bytes_left) == 2
    assert max(access.bytes_left) < 10 * 10**6
