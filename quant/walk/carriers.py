"""Faster stand-ins for the parts of a layer that only carry calibration activations, where this machine has them.

A walk spends most of its time in products whose results nobody keeps: they are computed as they will be when the result
is served, from packed 4-bit weights and activations rounded to int8, and attention without its future half. Knows no
layers by name; `quant.walk.quantize_model` calls this.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from quant.int4_linear import QuantizedLinear
from quant.native.attention import Attend, faster_attention
from quant.native.linear import NativeLinear, is_native_right, why_not_native


class _Attending(Protocol):
    """`serving.model.transformer.Attention` is one."""

    attend: Attend


class CarryingLinear(nn.Module):
    """A quantised linear's product on the native kernel: 1.5 times as fast as bf16's, 0.5 % off."""

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self._kernel = NativeLinear(linear.matrix, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out), of x's type."""
        return self._kernel(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def carrier_of(linear: QuantizedLinear, dtype: torch.dtype) -> nn.Module:
    """What computes the linear for activations of `dtype`. In float32 it is the linear itself: nothing is rounded.

    At 8 bits it is as well: the kernel may read such a matrix as 4-bit levels, which other engines do not.
    """
    matrix = linear.matrix
    if dtype == torch.float32 or matrix.bits != 4 or why_not_native(matrix) is not None or not is_native_right():
        return linear
    return CarryingLinear(linear)


def carry_faster(layer: nn.Module, dtype: torch.dtype) -> None:
    """Exchange what is faster otherwise: attention, and quantised linears. The layer is for activations only then."""
    for module in list(layer.modules()):
        plain = getattr(module, "attend", None)
        if plain is not None:
            cast("_Attending", module).attend = faster_attention(plain)
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedLinear):
                setattr(module, name, carrier_of(child, dtype))
