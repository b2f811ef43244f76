"""Rows of numbers as int8 codes with a scale each: how an int8 KV cache keeps a head of one token's keys or values.

`quantize_head` in quant/native/decode_step.c is the native twin.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The range of float32, so that small numbers keep a scale. That it is coarse costs nothing: codes are rounded by the
# scale that is stored, and the largest quotient, 127 / (1 - 2**-9), still rounds to 127.
SCALE_DTYPE = torch.bfloat16
_LARGEST_CODE = 127


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows: (..., width) of any float type. Returns codes (..., width) int8 and scales (...) bfloat16.

    A dequantised number is at most half its row's scale off.
    """
    exact = rows.to(torch.float32)
    scales = (exact.abs().amax(-1) / _LARGEST_CODE).to(SCALE_DTYPE)
    steps = scales.to(torch.float32)
    inverse = torch.where(steps >= torch.finfo(torch.float32).tiny, 1 / steps, 0.0)
    return (exact * inverse.unsqueeze(-1)).round_().to(torch.int8), scales


def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes: (..., width) int8; scales: (...) bfloat16. Returns (..., width) in `dtype`, rounded once."""
    return codes.to(dtype) * scales.to(dtype).unsqueeze(-1)
