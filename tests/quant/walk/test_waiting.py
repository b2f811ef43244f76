from __future__ import annotations

import errno
import os
from io import BufferedRandom, FileIO
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant.errors import QuantizationError
from quant.walk.waiting import WaitingActivations, waiting_activations

pytestmark = pytest.mark.unit


def batches(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def taken(waiting: WaitingActivations) -> list[Tensor]:
    return [batch.clone() for batch in waiting.take()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batches_come_back_as_they_were_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    kept = batches((4, 8, 6), (4, 8, 6), (1, 8, 6), dtype=dtype)
    with waiting_activations(tmp_path) as waiting:
        passed = list(waiting.keep(kept))
        found = taken(waiting)
    assert all(map(torch.equal, passed, kept))
    assert [batch.dtype for batch in found] == [dtype] * 3
    assert all(map(torch.equal, found, kept))


def test_a_view_comes_back_in_its_own_order(tmp_path: Path) -> None:
    turned = torch.arange(12.0).view(3, 4).T
    with waiting_activations(tmp_path) as waiting:
        list(waiting.keep([turned]))
        assert torch.equal(taken(waiting)[0], turned)


def test_the_next_ones_take_the_place_of_those_before(tmp_path: Path) -> None:
    with waiting_activations(tmp_path) as waiting:
        list(waiting.keep(batches((4, 8), (4, 8))))
        later = batches((3, 8), (1, 8), (1, 8))
        list(waiting.keep(later))
        assert all(map(torch.equal, taken(waiting), later))
        wider = batches((9, 9), dtype=torch.float32)
        list(waiting.keep(wider))
        assert all(map(torch.equal, taken(waiting), wider))
        narrower = batches((2, 2))
        list(waiting.keep(narrower))
        assert [batch.dtype for batch in taken(waiting)] == [torch.bfloat16]
        assert all(map(torch.equal, taken(waiting), narrower))


def test_nobody_else_sees_the_file_and_it_is_gone_afterwards(tmp_path: Path) -> None:
    with waiting_activations(tmp_path) as waiting:
        list(waiting.keep(batches((4, 8))))
        assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_cut_short_is_an_error(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        waiting = WaitingActivations(file)
        list(waiting.keep(batches((4, 8), (4, 8))))
        file.flush()
        os.truncate(file.fileno(), 70)
        with pytest.raises(QuantizationError, match="could not be read back whole"):
            list(waiting.take())


def test_a_full_disk_is_met_while_keeping(tmp_path: Path) -> None:
    class Full(FileIO):
        def write(self, content: object, /) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    raw = Full(tmp_path / "file", "w+")
    waiting = WaitingActivations(BufferedRandom(raw))
    with raw, pytest.raises(OSError, match="No space left") as raised:
        list(waiting.keep(batches((512, 512))))
    assert raised.value.errno == errno.ENOSPC
