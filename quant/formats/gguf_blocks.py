"""Codes and scales laid out as GGUF's blocks of 32 numbers. Pure functions on arrays; `gguf` reads what they write.

Block layouts: github.com/ggml-org/ggml/blob/master/src/ggml-common.h. All scales are fp16 and may be negative.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

BLOCK: Final = 32
Q4_0_ZERO: Final = 8
Q8_0_ZERO: Final = 128

Bytes: TypeAlias = "NDArray[np.uint8]"
Floats: TypeAlias = "NDArray[np.float32]"


def pack_q4_0(codes: Bytes, scales: Floats) -> Bytes:
    """value = (code - 8) * scale.

    codes: (out, in) below 16; scales: (out, in / 32), each exact in fp16. Returns (out, in / 32 * 18).
    """
    return _rows(_half_bytes(scales), _nibble_pairs(codes))


def pack_q4_1(codes: Bytes, scales: Floats, minimums: Floats) -> Bytes:
    """value = code * scale + minimum; the minimum is rounded to fp16 here.

    codes: (out, in) below 16; scales, minimums: (out, in / 32). Returns (out, in / 32 * 20).
    """
    return _rows(_half_bytes(scales), _half_bytes(minimums), _nibble_pairs(codes))


def pack_q8_0(codes: Bytes, scales: Floats) -> Bytes:
    """value = (code - 128) * scale.

    codes: (out, in) uint8; scales: (out, in / 32), each exact in fp16. Returns (out, in / 32 * 34).
    """
    signed = codes ^ np.uint8(Q8_0_ZERO)  # as int8 this is the code less 128
    return _rows(_half_bytes(scales), signed.reshape(len(codes), -1, BLOCK))


def round_to_q8_0(values: Floats) -> Bytes:
    """The nearest Q8_0 blocks to (out, in) values, as ggml's reference rounds them. Returns (out, in / 32 * 34)."""
    blocks = values.reshape(len(values), -1, BLOCK)
    scales = np.abs(blocks).max(axis=2) / np.float32(127)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    scaled = blocks * inverse[:, :, None]
    # Half away from zero, as C's roundf; numpy's own rounding goes to even.
    codes = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    return _rows(_half_bytes(scales), codes.view(np.uint8))


def permute_rows(rows: NDArray[np.generic], num_heads: int) -> NDArray[np.generic]:
    """Interleaves the two halves of each head's rotary dimensions, as llama.cpp wants them of Llama's q and k.

    rows: (heads * head_dim, ...), a row being one output, packed or not. The inverse of `unpermute_rows`.
    """
    halves = rows.reshape(num_heads, 2, -1, *rows.shape[1:])  # (heads, half, head_dim / 2, ...)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _half_bytes(values: Floats) -> Bytes:
    """(out, blocks) -> (out, blocks, 2)."""
    return np.ascontiguousarray(values.astype(np.float16)).view(np.uint8).reshape(*values.shape, 2)


def _nibble_pairs(codes: Bytes) -> Bytes:
    """(out, in) -> (out, blocks, 16): byte i holds element i of its block below and element 16 + i above."""
    halves = codes.reshape(len(codes), -1, 2, BLOCK // 2)
    return halves[:, :, 0] | (halves[:, :, 1] << np.uint8(4))


def _rows(*parts: Bytes) -> Bytes:
    """Parts (out, blocks, bytes) one after the other in each block -> (out, bytes of a row)."""
    return np.concatenate(parts, axis=2).reshape(len(parts[0]), -1)
