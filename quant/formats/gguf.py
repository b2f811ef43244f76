"""Reads GGUF files: header, metadata, and tensors as float32 arrays.

The file is mapped, never loaded whole; a tensor costs memory only while it is dequantised. Every length and offset is
checked against the file's size before it is used, so a malformed file is refused with what was wrong with it. What the
metadata mean is up to `gguf_conversion`. Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quant.errors import CheckpointError

Scalar: TypeAlias = "bool | int | float | str"
MetadataValue: TypeAlias = "Scalar | list[MetadataValue]"
Bytes: TypeAlias = "NDArray[np.uint8]"
Floats: TypeAlias = "NDArray[np.float32]"

_READABLE_VERSIONS: Final = (2, 3)
_DEFAULT_ALIGNMENT: Final = 32
_MAX_DIMENSIONS: Final = 4
_MAX_NESTED_ARRAYS: Final = 4
# The largest vocabularies take some 20 MB. Beyond the header lie gigabytes of weights, which a false length would turn
# into Python objects.
MAX_HEADER_BYTES: Final = 128 * 2**20
MAX_ARRAY_ITEMS: Final = 2**22
_MAX_ALIGNMENT: Final = 2**20
_BOOL: Final = 7
_STRING: Final = 8
_ARRAY: Final = 9
_SCALAR_FORMATS: Final[Mapping[int, str]] = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", _BOOL: "<B", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorType:
    """How a run of `block_elements` numbers is stored in `block_bytes` bytes.

    `dequantize` takes (blocks, block_bytes) uint8 and returns (blocks, block_elements) float32.
    """

    name: str
    block_elements: int
    block_bytes: int
    dequantize: Callable[[Bytes], Floats]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`shape` is in row-major order, as torch has it: the reverse of what the file writes."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int
    num_bytes: int


def half_numbers(block_bytes: Bytes) -> Floats:
    """(..., 2) bytes of one fp16 number each -> (..., 1) float32."""
    return np.ascontiguousarray(block_bytes).view(np.float16).astype(np.float32)


def nibbles(packed: Bytes) -> Bytes:
    """(..., n) -> (..., 2n): all low nibbles first, then all high ones."""
    return np.concatenate((packed & np.uint8(15), packed >> np.uint8(4)), axis=-1)


def _from_f32(blocks: Bytes) -> Floats:
    return blocks.view(np.float32)


def _from_f16(blocks: Bytes) -> Floats:
    return blocks.view(np.float16).astype(np.float32)


def _from_bf16(blocks: Bytes) -> Floats:
    return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _from_q8_0(blocks: Bytes) -> Floats:
    return half_numbers(blocks[:, :2]) * blocks[:, 2:].view(np.int8)


def _from_q4_0(blocks: Bytes) -> Floats:
    codes = nibbles(blocks[:, 2:]).astype(np.int8) - np.int8(8)
    return half_numbers(blocks[:, :2]) * codes


def _from_q4_1(blocks: Bytes) -> Floats:
    return half_numbers(blocks[:, :2]) * nibbles(blocks[:, 4:]) + half_numbers(blocks[:, 2:4])


def _fives(high_bits: Bytes, packed: Bytes) -> Bytes:
    """(blocks, 4) fifth bits, one of each code in order, and (blocks, 16) nibbles -> (blocks, 32) codes below 32."""
    return nibbles(packed) | (np.unpackbits(high_bits, axis=1, bitorder="little") << np.uint8(4))


def _from_q5_0(blocks: Bytes) -> Floats:
    codes = _fives(blocks[:, 2:6], blocks[:, 6:]).astype(np.int8) - np.int8(16)
    return half_numbers(blocks[:, :2]) * codes


def _from_q5_1(blocks: Bytes) -> Floats:
    return half_numbers(blocks[:, :2]) * _fives(blocks[:, 4:8], blocks[:, 8:]) + half_numbers(blocks[:, 2:4])


def _from_q4_k(blocks: Bytes) -> Floats:
    """256 numbers: fp16 scales of the scales and of the minimums, 8 six-bit pairs of those in 12 bytes, 8 runs of 32
    nibbles, two runs sharing their bytes."""
    factors = blocks[:, 4:16].reshape(-1, 3, 4)  # of run j < 4: scale, minimum; of run 4 + j: the nibbles of both
    low, middle, nibbles = factors[:, 0], factors[:, 1], factors[:, 2]
    scales = np.concatenate((low & 63, (nibbles & 15) | (low >> 6 << 4)), axis=1)  # (blocks, 8)
    minimums = np.concatenate((middle & 63, (nibbles >> 4) | (middle >> 6 << 4)), axis=1)
    packed = blocks[:, 16:].reshape(-1, 4, 1, 32)
    codes = (packed >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)) & 15  # (blocks, pair, nibble, 32)
    steps = half_numbers(blocks[:, :2]) * scales.astype(np.float32)
    offsets = half_numbers(blocks[:, 2:4]) * minimums.astype(np.float32)
    values = steps[:, :, None] * codes.reshape(-1, 8, 32)
    values -= offsets[:, :, None]
    return values.reshape(-1, 256)


def _from_q6_k(blocks: Bytes) -> Floats:
    """256 numbers: 128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales of 16 numbers, one fp16 scale."""
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = (low >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)) & 15  # (blocks, half, nibble, 64)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    high = (high >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)) & 3  # (blocks, half, pair, 32)
    codes = (low.reshape(-1, 16, 16) | (high.reshape(-1, 16, 16) << 4)).astype(np.int8) - np.int8(32)
    scales = half_numbers(blocks[:, 208:210]) * blocks[:, 192:208].view(np.int8)  # (blocks, 16)
    return (scales[:, :, None] * codes).reshape(-1, 256)


TENSOR_TYPES: Final[Mapping[int, TensorType]] = {
    0: TensorType("F32", 1, 4, _from_f32),
    1: TensorType("F16", 1, 2, _from_f16),
    2: TensorType("Q4_0", 32, 18, _from_q4_0),
    3: TensorType("Q4_1", 32, 20, _from_q4_1),
    # What llama.cpp's K-quants become in rows that are no multiple of 256.
    6: TensorType("Q5_0", 32, 22, _from_q5_0),
    7: TensorType("Q5_1", 32, 24, _from_q5_1),
    8: TensorType("Q8_0", 32, 34, _from_q8_0),
    12: TensorType("Q4_K", 256, 144, _from_q4_k),
    14: TensorType("Q6_K", 256, 210, _from_q6_k),
    30: TensorType("BF16", 1, 2, _from_bf16),
}


class GgufFile:
    """An open GGUF file. Close it, or use it as a context manager; arrays from `read` stay valid afterwards."""

    def __init__(self, path: Path) -> None:
        """Reads header and metadata. Raises CheckpointError when the file is not a GGUF file that can be read."""
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise CheckpointError(f"{path} is empty; expected a GGUF file: download it again")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            header = _HeaderReader(self._map, path)
            self.metadata: Mapping[str, MetadataValue] = header.metadata
            self.tensors: Mapping[str, TensorInfo] = header.tensors
        except BaseException:
            self._map.close()
            raise

    def read(self, name: str) -> Floats:
        """The tensor's values, dequantised, in a fresh array of its row-major shape."""
        tensor = self.tensors[name]
        values = tensor.type.dequantize(self.read_bytes(name).reshape(-1, tensor.type.block_bytes))
        return np.array(values, np.float32).reshape(tensor.shape)

    def read_bytes(self, name: str) -> Bytes:
        """The tensor as it is stored, (bytes,)."""
        tensor = self.tensors[name]
        return np.frombuffer(self._map[tensor.offset : tensor.offset + tensor.num_bytes], np.uint8)

    def close(self) -> None:
        self._map.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _HeaderReader:
    """One pass over the part of the file before the tensor data."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._position = 0
        self._num_items = 0
        num_tensors, num_metadata = self._read_preamble()
        self.metadata = self._read_metadata(num_metadata)
        self.tensors = self._read_tensors(num_tensors)

    def _fail(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is not a GGUF file that can be read: {reason}; download it again")

    def _take(self, num_bytes: int, what: str) -> bytes:
        end = self._position + num_bytes
        if end > len(self._data):
            raise self._fail(f"it ends at byte {len(self._data):,} inside {what:.120}, which needs {end:,}")
        if end > MAX_HEADER_BYTES:
            raise self._fail(f"{what:.120} ends at byte {end:,}; headers are read up to {MAX_HEADER_BYTES:,}")
        chunk = self._data[self._position : end]
        self._position = end
        return chunk

    def _number(self, layout: str, what: str) -> int:
        return int(struct.unpack(layout, self._take(struct.calcsize(layout), what))[0])

    def _string(self, what: str) -> str:
        raw = self._take(self._number("<Q", what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._fail(f"{what} is not UTF-8 text") from error

    def _read_preamble(self) -> tuple[int, int]:
        magic = self._take(4, "the magic number")
        if magic != b"GGUF":
            raise self._fail(f"it starts with {magic!r}, expected b'GGUF'")
        version = self._number("<I", "the version")
        if version not in _READABLE_VERSIONS:
            # A big-endian file shows its version with the bytes reversed.
            raise self._fail(f"version {version}, expected one of {_READABLE_VERSIONS} in little-endian order")
        return self._number("<Q", "the tensor count"), self._number("<Q", "the metadata count")

    def _read_metadata(self, count: int) -> dict[str, MetadataValue]:
        metadata: dict[str, MetadataValue] = {}
        for index in range(count):
            key = self._string(f"metadata key {index}")
            if key in metadata:
                raise self._fail(f"metadata key {key!r:.80} occurs twice")
            kind = self._number("<I", f"the type of {key!r:.80}")
            metadata[key] = self._value(kind, f"metadata {key!r:.80}", depth=0)
        return metadata

    def _value(self, kind: int, what: str, depth: int) -> MetadataValue:
        if kind == _STRING:
            return self._string(what)
        if kind == _ARRAY:
            return self._array(what, depth)
        layout = _SCALAR_FORMATS.get(kind)
        if layout is None:
            raise self._fail(f"{what} has the unknown value type {kind}")
        value = struct.unpack(layout, self._take(struct.calcsize(layout), what))[0]
        return bool(value) if kind == _BOOL else value

    def _array(self, what: str, depth: int) -> list[MetadataValue]:
        if depth >= _MAX_NESTED_ARRAYS:
            raise self._fail(f"{what} nests arrays more than {_MAX_NESTED_ARRAYS} deep")
        kind, length = self._number("<I", what), self._number("<Q", what)
        self._num_items += length
        if self._num_items > MAX_ARRAY_ITEMS:
            raise self._fail(f"{what:.120} has {length:,} items; all arrays together may have {MAX_ARRAY_ITEMS:,}")
        layout = _SCALAR_FORMATS.get(kind)
        if layout is None:
            return [self._value(kind, f"{what}[{index}]", depth + 1) for index in range(length)]
        raw = self._take(length * struct.calcsize(layout), what)
        values: list[MetadataValue] = [item[0] for item in struct.iter_unpack(layout, raw)]
        return [bool(value) for value in values] if kind == _BOOL else values

    def _read_tensors(self, count: int) -> dict[str, TensorInfo]:
        records = [self._tensor_record(index) for index in range(count)]
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT:
            raise self._fail(f"general.alignment is {alignment!r:.60}, expected 1 to {_MAX_ALIGNMENT:,}")
        data_start = -(-self._position // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, type_id, offset in records:
            if name in tensors:
                raise self._fail(f"tensor {name!r:.80} occurs twice")
            if offset % alignment:
                raise self._fail(f"tensor {name!r:.80} lies at offset {offset:,}, not a multiple of {alignment}")
            tensors[name] = self._checked_tensor(name, shape, type_id, data_start + offset)
        self._refuse_overlaps(tensors.values())
        return tensors

    def _refuse_overlaps(self, tensors: Iterable[TensorInfo]) -> None:
        end = 0
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise self._fail(f"tensor {tensor.name!r:.80} overlaps the tensor before it")
            end = tensor.offset + tensor.num_bytes

    def _tensor_record(self, index: int) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(f"the name of tensor {index}")
        num_dimensions = self._number("<I", f"tensor {name!r:.80}")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self._fail(f"tensor {name!r:.80} has {num_dimensions} dimensions, expected 1 to {_MAX_DIMENSIONS}")
        dimensions = [self._number("<Q", f"the shape of {name!r:.80}") for _ in range(num_dimensions)]
        type_id, offset = self._number("<I", f"tensor {name!r:.80}"), self._number("<Q", f"tensor {name!r:.80}")
        return name, tuple(reversed(dimensions)), type_id, offset

    def _checked_tensor(self, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> TensorInfo:
        kind = TENSOR_TYPES.get(type_id)
        if kind is None:
            known = ", ".join(known.name for known in TENSOR_TYPES.values())
            raise CheckpointError(
                f"{self._path}: tensor {name!r:.80} has the type number {type_id}, which is not supported; "
                f"supported are {known}: use a file in one of them"
            )
        if 0 in shape or shape[-1] % kind.block_elements:
            raise self._fail(
                f"tensor {name!r:.80} has shape {shape}, but {kind.name} rows hold {kind.block_elements}·n"
            )
        num_bytes = math.prod(shape) // kind.block_elements * kind.block_bytes
        if offset + num_bytes > len(self._data):
            raise self._fail(
                f"tensor {name!r:.80} ends at byte {offset + num_bytes:,}, the file at byte {len(self._data):,}"
            )
        return TensorInfo(name, shape, kind, offset, num_bytes)
