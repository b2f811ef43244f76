"""Weights in the order that kernels.h reads them, in numpy: the moderation encoder runs where there is no torch."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["BLOCK_OUTPUTS", "GROUP_MULTIPLE", "CMatrix", "by_block", "pack_codes"]

GROUP_MULTIPLE = 32
BLOCK_OUTPUTS = 16


class CMatrix(ctypes.Structure):
    """`Matrix` of kernels.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("bits", ctypes.c_int32),
    )


def pack_codes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """(out, in) codes, flat.

    Blocks of 16 outputs; in a block, steps along the inputs of 64 bytes: 16 outputs times 4 bytes. At 8 bits a step is
    4 inputs; at 4 bits it is 8, of which the later four lie in the upper halves of the bytes.
    """
    out_features, in_features = codes.shape
    blocks = codes.reshape(out_features // BLOCK_OUTPUTS, BLOCK_OUTPUTS, -1, 4).swapaxes(1, 2)  # (blocks, steps, 16, 4)
    if bits == 8:
        return np.ascontiguousarray(blocks).reshape(-1)
    halves = blocks.reshape(out_features // BLOCK_OUTPUTS, in_features // 8, 2, BLOCK_OUTPUTS, 4)
    return np.bitwise_or(halves[:, :, 0], halves[:, :, 1] << 4, dtype=np.uint8).reshape(-1)


def by_block(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(out, groups) -> (blocks, groups, 16), flat."""
    return np.ascontiguousarray(values.reshape(-1, BLOCK_OUTPUTS, values.shape[1]).swapaxes(1, 2)).reshape(-1)
