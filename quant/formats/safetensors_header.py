"""Reads the header of a safetensors file and proves that it describes the file, before a library maps anything.

A header is whatever its author wrote: every length, shape and offset in it is held against the file's real size, and
nothing is allocated for what it merely claims. Called wherever this project opens a safetensors file that it did not
write. Format: 8 bytes little-endian header length, that much JSON, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import BinaryIO, Final, cast

from quant.errors import CheckpointError

# A hundred thousand tensors take about 10 MB of header; the parsed form takes some ten times its text.
MAX_HEADER_BYTES: Final = 16 * 2**20
# Empty tensors have no bytes to hold a shape against, and products of sizes must stay far from 2**63.
MAX_ELEMENTS: Final = 2**48
MAX_DIMENSIONS: Final = 8
_LARGEST_COUNT: Final = 2**63
_LENGTH_BYTES: Final = 8
_METADATA_KEY: Final = "__metadata__"
_ITEM_BYTES: Final[Mapping[str, int]] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: bytes `start` to `end` of the file. `dtype` is the format's name for it, such as "BF16"."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file holds. `metadata` is free text of its writer, such as {"format": "pt"}."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def check_safetensors(path: Path) -> Header:
    """The checked header of `path`; of the tensors not a byte is read.

    Raises CheckpointError where header and file do not agree: cut short, overlaps, gaps, absurd shapes, duplicates.
    """
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        text = _read_header_text(file, path, file_bytes)
    try:
        parsed: object = json.loads(text, object_pairs_hook=_unique)
    except _DuplicateKeyError as error:
        raise _refusal(path, f"its header names {error.key!r:.80} twice") from None
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"its header is not JSON ({error!s:.120})") from error
    if not isinstance(parsed, dict):
        raise _refusal(path, f"its header is a JSON {type(parsed).__name__}, expected an object")
    fields = cast("dict[str, object]", parsed)
    metadata = _metadata(fields.pop(_METADATA_KEY, {}), path)
    data_start = _LENGTH_BYTES + len(text)
    tensors = {name: _tensor(name, value, data_start, path) for name, value in fields.items()}
    _check_coverage(tensors, data_start, file_bytes, path)
    return Header(tensors, metadata)


def _refusal(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a safetensors file that can be read: {reason}; download or write it again")


def _read_header_text(file: BinaryIO, path: Path, file_bytes: int) -> bytes:
    """The header's JSON. Its stated length is believed only once the file is known to be that long."""
    prefix = file.read(_LENGTH_BYTES)
    if len(prefix) < _LENGTH_BYTES:
        raise _refusal(path, f"it has {file_bytes} bytes, fewer than the {_LENGTH_BYTES} of its header's length")
    length = int(struct.unpack("<Q", prefix)[0])
    if length > file_bytes - _LENGTH_BYTES:
        raise _refusal(path, f"its header claims {length:,} bytes, the whole file has {file_bytes:,}")
    if length > MAX_HEADER_BYTES:
        raise _refusal(path, f"its header has {length:,} bytes, more than the {MAX_HEADER_BYTES:,} that are read")
    return file.read(length)


class _DuplicateKeyError(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    """A JSON object. Of two equal keys Python would keep the last and another reader the first."""
    values: dict[str, object] = {}
    for key, value in pairs:
        if key in values:
            raise _DuplicateKeyError(key)
        values[key] = value
    return values


def _metadata(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _refusal(path, f"{_METADATA_KEY} is {short(value)}, expected an object of strings")
    for key, text in cast("dict[str, object]", value).items():
        if not isinstance(text, str):
            raise _refusal(path, f"{_METADATA_KEY} {key!r:.80} is {short(text)}, expected a string")
    return cast("dict[str, str]", value)


def _tensor(name: str, value: object, data_start: int, path: Path) -> StoredTensor:
    if not isinstance(value, dict) or set(cast("dict[str, object]", value)) != {"dtype", "shape", "data_offsets"}:
        raise _refusal(path, f"tensor {name!r:.80} is {short(value)}, expected its dtype, shape and data_offsets")
    fields = cast("dict[str, object]", value)
    dtype = fields["dtype"]
    item_bytes = _ITEM_BYTES.get(dtype) if isinstance(dtype, str) else None
    if not isinstance(dtype, str) or item_bytes is None:
        raise _refusal(path, f"tensor {name!r:.80} has dtype {short(dtype)}, which is not known")
    shape = _counts(fields["shape"])
    if shape is None or len(shape) > MAX_DIMENSIONS or math.prod(size or 1 for size in shape) > MAX_ELEMENTS:
        raise _refusal(path, f"tensor {name!r:.80} has the shape {short(fields['shape'])}, which no tensor can have")
    offsets = _counts(fields["data_offsets"])
    if offsets is None or len(offsets) != 2:
        raise _refusal(path, f"tensor {name!r:.80} has data_offsets {short(fields['data_offsets'])}, expected two")
    start, end = offsets
    if end - start != math.prod(shape) * item_bytes:
        raise _refusal(
            path,
            f"tensor {name!r:.80} of shape {list(shape)} needs {math.prod(shape) * item_bytes:,} bytes, "
            f"its data_offsets give it {end - start:,}",
        )
    return StoredTensor(dtype, shape, data_start + start, data_start + end)


def _counts(value: object) -> tuple[int, ...] | None:
    """A JSON list of whole numbers that a 64-bit reader can hold, else None."""
    if not isinstance(value, list):
        return None
    counts: list[int] = []
    for item in cast("list[object]", value):
        # Compared by type, since True is an int to isinstance.
        if type(item) is not int or not 0 <= item < _LARGEST_COUNT:
            return None
        counts.append(item)
    return tuple(counts)


def _check_coverage(tensors: Mapping[str, StoredTensor], data_start: int, file_bytes: int, path: Path) -> None:
    """In the order of their bytes, tensors must begin where the one before ends, and end where the file does."""
    position = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != position:
            problem = "overlaps the tensor before it" if tensor.start < position else "follows bytes of no tensor"
            raise _refusal(path, f"tensor {name!r:.80} {problem} (byte {tensor.start:,}, expected {position:,})")
        position = tensor.end
    if position != file_bytes:
        raise _refusal(path, f"its tensors end at byte {position:,}, the file at byte {file_bytes:,}")
