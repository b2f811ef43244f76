"""Writes GGUF version 3 files, tensor by tensor, so that a model never has to be in memory whole.

A header's size follows from names and shapes alone: room is left for it, tensors are appended as they come, and the
header is written last, when types and offsets are known. A file appears under its name whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import secrets
import struct
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quant.errors import CheckpointError
from quant.formats.gguf import TENSOR_TYPES, TensorType

Value: TypeAlias = "bool | int | float | str | Sequence[str] | Sequence[int]"

ALIGNMENT: Final = 32
_VERSION: Final = 3
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_TYPE_IDS: Final[Mapping[str, int]] = {kind.name: type_id for type_id, kind in TENSOR_TYPES.items()}


@dataclass(frozen=True, slots=True)
class _Record:
    """One tensor as the header names it. `offset` in bytes from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


class GgufWriter:
    """Fills one open file. `shapes` are the row-major shapes of every tensor that will be written."""

    def __init__(self, file: BinaryIO, metadata: Mapping[str, Value], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._file = file
        self._metadata = metadata
        self._shapes = dict(shapes)
        self._records: list[_Record] = []
        self._data_bytes = 0
        placeholders = [_Record(name, shape, 0, 0) for name, shape in shapes.items()]
        self._data_start = _aligned(len(self._header(placeholders)))
        file.write(bytes(self._data_start))

    def write(self, name: str, type_name: str, rows: NDArray[np.generic]) -> None:
        """Append a tensor whose bytes are `rows`, already in the blocks of the type named, such as "Q4_0"."""
        shape = self._shapes.pop(name)
        type_id = _TYPE_IDS[type_name]
        expected = _num_bytes(shape, TENSOR_TYPES[type_id])
        if rows.nbytes != expected:
            raise ValueError(f"{name} of shape {shape} takes {expected} bytes in {type_name}; found {rows.nbytes}")
        self._records.append(_Record(name, shape, type_id, self._data_bytes))
        self._file.write(np.ascontiguousarray(rows).data)
        self._file.write(bytes(_aligned(expected) - expected))
        self._data_bytes += _aligned(expected)

    def finish(self) -> None:
        """Write the header. ValueError if a tensor that was announced is missing."""
        if self._shapes:
            raise ValueError(f"{len(self._shapes)} tensors were not written, {min(self._shapes)} among them")
        self._file.seek(0)
        self._file.write(self._header(self._records))

    def _header(self, records: Sequence[_Record]) -> bytes:
        parts = [b"GGUF", struct.pack("<IQQ", _VERSION, len(records), len(self._metadata))]
        parts += [_string(key) + _typed(value) for key, value in self._metadata.items()]
        for record in records:
            dimensions = struct.pack(f"<I{len(record.shape)}Q", len(record.shape), *reversed(record.shape))
            parts.append(_string(record.name) + dimensions + struct.pack("<IQ", record.type_id, record.offset))
        return b"".join(parts)


@contextlib.contextmanager
def publish_file(target: Path) -> Generator[BinaryIO]:
    """Yields a file to write; it takes the name `target`, replacing nothing, when the block ends without error.

    After an error nothing is left. Raises CheckpointError where `target` exists or the disk is full.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists; give the name of a new file, or remove it")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent} is not a directory; make it first")
    partial = target.parent / f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    written = 0
    try:
        with partial.open("wb") as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
            finally:
                with contextlib.suppress(OSError):
                    written = os.fstat(file.fileno()).st_size
        partial.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise CheckpointError(
            f"{target} could not be written: {error.strerror} after {written / 1e6:,.0f} MB; nothing was left there: "
            "free some space, or give a name on a larger disk"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _num_bytes(shape: tuple[int, ...], kind: TensorType) -> int:
    if shape[-1] % kind.block_elements:
        raise ValueError(f"rows of {shape[-1]} do not fill blocks of {kind.block_elements}")
    return math.prod(shape) // kind.block_elements * kind.block_bytes


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Value) -> bytes:
    """A metadata value with its type in front: counts are uint32, as llama.cpp reads them, lists hold one type."""
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    texts = [item for item in value if isinstance(item, str)]
    if texts:
        return struct.pack("<IIQ", _ARRAY, _STRING, len(texts)) + b"".join(map(_string, texts))
    return struct.pack(f"<IIQ{len(value)}i", _ARRAY, _INT32, len(value), *value)
