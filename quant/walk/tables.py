"""The tables of the vocabulary, embeddings and head, as they are read: some rows at a time, plain or still packed.

Which of them a model has, and how they are quantised, belongs to `quant.walk.ends`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from quant.formats.tensor_files import TensorFile
from quant.method.matrix import QuantizedMatrix


class Table(Protocol):
    """(vocabulary, hidden); what is read of it is float32, however it is stored."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` up to, not including, `last`."""
        ...

    def gather(self, ids: Tensor) -> Tensor:
        """ids (n,) int64 -> (n, hidden)."""
        ...


@dataclass(frozen=True, slots=True)
class StoredTable:
    """A plain table on disk: only what is asked for is read, and nothing kept."""

    file: TensorFile
    name: str

    @property
    def shape(self) -> tuple[int, int]:
        vocabulary, hidden = self.file.tensors[self.name].shape
        return vocabulary, hidden

    def rows(self, first: int, last: int) -> Tensor:
        return self.file.rows(self.name, first, last).to(torch.float32)

    def gather(self, ids: Tensor) -> Tensor:
        return self.file.gather(self.name, cast("list[int]", ids.tolist())).to(torch.float32)


@dataclass(frozen=True, slots=True)
class HeldTable:
    """A plain table in memory, in its stored type: a float32 copy would be most of a small model's memory."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        vocabulary, hidden = self.tensor.shape
        return vocabulary, hidden

    def rows(self, first: int, last: int) -> Tensor:
        return self.tensor[first:last].to(torch.float32)

    def gather(self, ids: Tensor) -> Tensor:
        return self.tensor[ids].to(torch.float32)


@dataclass(frozen=True, slots=True)
class CodedTable:
    """A quantised table in memory. `take` gives some of its rows: those of a slice, or by their numbers."""

    take: Callable[[slice | Tensor], QuantizedMatrix]
    shape: tuple[int, int]

    def rows(self, first: int, last: int) -> Tensor:
        return self.take(slice(first, last)).dequantize()

    def gather(self, ids: Tensor) -> Tensor:
        return self.take(ids).dequantize()
