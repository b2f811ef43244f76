"""What carries calibration activations takes the place of attention, and of nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quant.int4_linear import QuantizedLinear
from quant.method.gptq import GptqOptions, round_to_nearest
from quant.native.attention import NativeAttention
from quant.native.linear import is_native_right
from quant.walk.carriers import carry_faster

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not is_native_right(), reason="no native kernels on this machine"),
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn((48, 128), generator=torch.Generator().manual_seed(0))
        self.attend = plain_attention
        self.o_proj = QuantizedLinear(round_to_nearest(weight, GptqOptions(group_size=32)), None)
        self.norm = nn.LayerNorm(8)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    return q


def test_a_layer_that_only_carries_gets_faster_attention_and_keeps_the_rest() -> None:
    block = Block()
    kept = block.o_proj
    carry_faster(block)
    assert isinstance(block.attend, NativeAttention)
    assert block.o_proj is kept
    assert isinstance(block.norm, nn.LayerNorm)
