"""Which scales can be stored: in the checkpoint's fp16 and, at 4 bits, in the fast product's bf16 as well."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.errors import QuantizationError

MIN_SCALE = 2.0**-20
MAX_SCALE = 65504.0


def storable_scale(scale: Tensor, bits: int) -> Tensor:
    """Round to what fp16 (the checkpoint) holds and, at 4 bits, also bf16 (the fast product); zero becomes MIN_SCALE.

    At 8 bits bf16 would move the far end of the grid by half a step, and there is no fast product to gain. Raises
    QuantizationError for scales beyond fp16.
    """
    if float(scale.abs().max()) > MAX_SCALE:
        raise QuantizationError(f"a group needs a scale of {float(scale.abs().max()):g}; fp16 holds {MAX_SCALE:g}")
    magnitude = scale.abs().clamp_min(MIN_SCALE)
    signed = torch.where(scale < 0, -magnitude, magnitude)
    if bits == 4:
        signed = signed.to(torch.bfloat16)
    return signed.to(torch.float16).to(torch.float32)
