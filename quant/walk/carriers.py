"""Faster stand-ins for the parts of a layer that only carry calibration activations, where this machine has them.

Attention alone, which the native one computes without its future half. Linears stay as they are: on the kernel that
serves, which rounds activations to int8, the result was worse and the walk no faster (docs/decisions/0009). Knows no
layers by name; `quant.walk.quantize_model` calls this.
"""

from __future__ import annotations

from typing import Protocol, cast

from torch import nn

from quant.native.attention import Attend, faster_attention


class _Attending(Protocol):
    """`serving.model.transformer.Attention` is one."""

    attend: Attend


def carry_faster(layer: nn.Module) -> None:
    """Exchange what is faster otherwise. The layer is for activations only then."""
    for module in layer.modules():
        plain = getattr(module, "attend", None)
        if plain is not None:
            cast("_Attending", module).attend = faster_attention(plain)
