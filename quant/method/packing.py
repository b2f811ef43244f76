"""Packing of small unsigned codes into int32 words, lowest bits first, as GPTQ checkpoints store them.

Pure functions on tensors. Which tensor is packed along which axis is the business of `quant.formats.autogptq`.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32
_WORD_BYTES = 4
PACKABLE_BITS = (4, 8)


def codes_per_word(bits: int) -> int:
    if bits not in PACKABLE_BITS:
        raise ValueError(f"{bits}-bit codes cannot be packed; 4 and 8 can")
    return WORD_BITS // bits


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack along the first axis: (n, columns) integers -> (n * bits / 32, columns) int32.

    Code r * per_word + j lies in bits [j * bits, (j + 1) * bits) of word r. Raises ValueError for a code that does not
    fit (it would spill into its neighbours) and for an n that does not fill whole words.
    """
    per_word = codes_per_word(bits)
    if codes.shape[0] % per_word:
        raise ValueError(f"{codes.shape[0]} codes do not fill whole words of {per_word}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(f"codes must lie in 0..{(1 << bits) - 1}; found {int(codes.min())}..{int(codes.max())}")
    # As bytes: whole words of 64 bits for each code would be sixteen times the result.
    in_word = codes.to(torch.uint8).unflatten(0, (-1, _WORD_BYTES, per_word // _WORD_BYTES))
    packed = in_word[:, :, 0] if bits == 8 else in_word[:, :, 0] | in_word[:, :, 1] << bits  # (words, bytes, columns)
    # Flat, since a single column counts as contiguous whatever its stride.
    return packed.transpose(1, 2).contiguous().flatten().view(torch.int32).unflatten(0, (-1, codes.shape[1]))


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_rows`: (w, columns) int32 -> (w * 32 / bits, columns) uint8."""
    return unpack_columns(words.t(), bits).t().contiguous()


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """Pack along the second axis: (rows, n) -> (rows, n * bits / 32) int32."""
    return pack_rows(codes.t(), bits).t().contiguous()


def unpack_columns(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_columns`: (rows, w) int32 -> (rows, w * 32 / bits) uint8.

    Works on bytes, not on shifted words: a model's start spends its time here.
    """
    per_word = codes_per_word(bits)
    # Flat as above. Lowest byte first: torch is little-endian.
    codes = words.contiguous().flatten().view(torch.uint8)  # (rows * w * 4,)
    if bits == 4:
        codes = torch.stack([codes & 0xF, codes >> 4], dim=-1)
    return codes.reshape(words.shape[0], words.shape[1] * per_word)
