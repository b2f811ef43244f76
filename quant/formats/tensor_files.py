"""Safetensors read and written one tensor at a time by plain file access, so that no more of a file is in memory.

A memory map would count every page that was touched as this process's own. Which tensors there are, and what becomes
of them, is up to the callers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from quant.errors import CheckpointError
from quant.formats.safetensors_header import StoredTensor, check_safetensors

_DTYPE_OF_NAME: Final[Mapping[str, torch.dtype]] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAME_OF_DTYPE: Final = {dtype: name for name, dtype in _DTYPE_OF_NAME.items()}
# The format wants every tensor to begin at a multiple of its item size; eight covers all of them.
_ALIGNMENT: Final = 8
# Rows of a larger tensor are read, converted and written in runs of about so many bytes.
_RUN_BYTES: Final = 32 * 2**20


class TensorFile:
    """An open view of one safetensors file: its checked header, and reads that copy exactly what is asked for."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError if the header does not describe the file."""
        header = check_safetensors(path)
        self.path = path
        self.tensors: Mapping[str, StoredTensor] = header.tensors
        self.metadata: Mapping[str, str] = header.metadata

    def dtype(self, name: str) -> torch.dtype:
        """Raises CheckpointError for a type that no weight here has."""
        stored = self.tensors[name].dtype
        if stored not in _DTYPE_OF_NAME:
            raise CheckpointError(f"{self.path}: {name} is {stored}; read are {', '.join(_DTYPE_OF_NAME)}")
        return _DTYPE_OF_NAME[stored]

    def read(self, name: str) -> Tensor:
        """The whole tensor, in memory of its own."""
        stored = self.tensors[name]
        return self._read(name, stored.start, stored.end, stored.shape)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows `first` up to, not including, `last` of the first dimension; a scalar has one row."""
        stored = self.tensors[name]
        num_rows = stored.shape[0] if stored.shape else 1
        row_bytes = (stored.end - stored.start) // max(num_rows, 1)
        shape = (last - first, *stored.shape[1:])
        return self._read(name, stored.start + first * row_bytes, stored.start + last * row_bytes, shape)

    def gather(self, name: str, rows: Sequence[int]) -> Tensor:
        """Single rows of the first dimension, in the order given; nothing else is read."""
        stored = self.tensors[name]
        row_bytes = (stored.end - stored.start) // max(stored.shape[0], 1)
        tensor = torch.empty((len(rows), *stored.shape[1:]), dtype=self.dtype(name))
        found = 0
        with self.path.open("rb", buffering=0) as file:
            for row, into in zip(rows, tensor.view(torch.uint8).flatten(1).numpy(), strict=True):
                file.seek(stored.start + row * row_bytes)
                found += file.readinto(into.data) or 0
        if found != len(rows) * row_bytes:
            raise CheckpointError(f"{self.path} ended while {name} was read; was it changed meanwhile?")
        return tensor

    def _read(self, name: str, start: int, end: int, shape: Sequence[int]) -> Tensor:
        tensor = torch.empty(tuple(shape), dtype=self.dtype(name))
        if end > start:
            with self.path.open("rb") as file:
                file.seek(start)
                found = file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data)
            if found != end - start:
                raise CheckpointError(f"{self.path} ended while {name} was read; was it changed meanwhile?")
        return tensor


@dataclass(frozen=True, slots=True)
class TensorToWrite:
    """One tensor of a file to come. `rows(first, last)` gives a run of its first dimension when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: Callable[[int, int], Tensor]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def held(name: str, tensor: Tensor) -> TensorToWrite:
    """A tensor that is in memory already."""
    flat = tensor if tensor.dim() else tensor.reshape(1)
    return TensorToWrite(name, tensor.dtype, tuple(tensor.shape), lambda first, last: flat[first:last])


def as_stored(file: TensorFile, stored: str, name: str | None = None) -> TensorToWrite:
    """A tensor of another file, copied as it is, under another name if one is given."""
    shape = file.tensors[stored].shape
    return TensorToWrite(name or stored, file.dtype(stored), shape, lambda first, last: file.rows(stored, first, last))


def write_tensors(path: Path, tensors: Sequence[TensorToWrite], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with one run of rows in memory at a time. OSError if the disk does not take it.

    Raises ValueError if a tensor turns out to be other than announced.
    """
    # As the format's own library does: the widest types first, so that each tensor begins at a multiple of its size.
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for tensor in ordered:
        end = position + tensor.num_bytes
        offsets = [position, end]
        header[tensor.name] = {
            "dtype": _NAME_OF_DTYPE[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in ordered:
            for run in runs_of(tensor):
                file.write(run.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def runs_of(tensor: TensorToWrite) -> Generator[Tensor]:
    """Its rows one run after the other; ValueError if one is other than announced."""
    num_rows = tensor.shape[0] if tensor.shape else 1
    if not tensor.num_bytes:
        return
    step = max(1, _RUN_BYTES * num_rows // tensor.num_bytes)
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        run = tensor.rows(first, last)
        if run.dtype is not tensor.dtype or tuple(run.shape) != (last - first, *tensor.shape[1:]):
            raise ValueError(f"{tensor.name} was announced as {tensor.dtype} {tensor.shape}; a run is {run.shape}")
        yield run
