"""Activations that wait in a file while the linear that reads them is quantised.

At a layer's widest place they are larger than all else that the walk holds: of 8 billion parameters and 65,536 tokens
1.9 GB. They are written once and read once, in order; a file without a name vanishes with its process, and the system's
cache holds as much of it as there is room for.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Generator, Iterable, Iterator
from io import BufferedRandom
from pathlib import Path

import torch
from torch import Tensor

from quant.errors import QuantizationError


class WaitingActivations:
    """Batches of one dtype, first in, first out; written over those that waited before."""

    def __init__(self, file: BufferedRandom) -> None:
        self._file = file
        self._shapes: list[torch.Size] = []
        self._buffer = torch.empty(0)

    def keep(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same batches, each one written before it is passed on. OSError where the disk is full."""
        self._shapes.clear()
        self._file.seek(0)
        for batch in batches:
            if batch.numel() > self._buffer.numel() or batch.dtype != self._buffer.dtype:
                self._buffer = torch.empty(batch.numel(), dtype=batch.dtype)
            self._file.write(_bytes_of(batch.contiguous()))
            self._shapes.append(batch.shape)
            yield batch

    def take(self) -> Iterator[Tensor]:
        """What was kept, each batch in the memory of the one before. QuantizationError if the file lacks some of it."""
        self._file.seek(0)
        for shape in self._shapes:
            # One buffer: memory that the system hands out anew for each batch costs more than reading.
            batch = self._buffer[: shape.numel()].view(shape)
            content = _bytes_of(batch)
            if self._file.readinto(content) != content.nbytes:
                raise QuantizationError("activations that waited in a temporary file could not be read back whole")
            yield batch


@contextlib.contextmanager
def waiting_activations(directory: Path | None = None) -> Generator[WaitingActivations]:
    """directory: where the file is made, the system's own for temporary files if None."""
    with tempfile.TemporaryFile(dir=directory) as file:
        yield WaitingActivations(file)


def _bytes_of(batch: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return batch.view(-1).view(torch.uint8).numpy().data
