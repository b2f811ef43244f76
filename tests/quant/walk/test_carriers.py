"""What carries calibration activations computes what it stands in for, and is used only where it may be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quant.int4_linear import QuantizedLinear, relative_error
from quant.method.gptq import GptqOptions, round_to_nearest
from quant.native.attention import NativeAttention
from quant.native.linear import is_native_right
from quant.walk.carriers import CarryingLinear, carrier_of, carry_faster

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not is_native_right(), reason="no native kernels on this machine"),
]

# Activations are rounded to a 127th of their group's largest, and the result to bf16.
TOLERANCE = 1e-2


def linear(outputs: int = 48, bits: int = 4, group_size: int = 32) -> QuantizedLinear:
    weight = torch.randn((outputs, 128), generator=torch.Generator().manual_seed(0))
    return QuantizedLinear(round_to_nearest(weight, GptqOptions(bits=bits, group_size=group_size)), torch.ones(outputs))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = plain_attention
        self.o_proj = linear()
        self.norm = nn.LayerNorm(8)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    return q


def test_a_carrier_gives_what_the_quantised_linear_gives() -> None:
    x = torch.randn((2, 5, 128), generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    carrier = carrier_of(linear(), torch.bfloat16)
    assert isinstance(carrier, CarryingLinear)
    assert carrier(x).dtype == torch.bfloat16
    assert carrier(x).shape == (2, 5, 48)
    assert relative_error(carrier(x), linear()(x.to(torch.float32))) <= TOLERANCE
    assert relative_error(1.03 * carrier(x), linear()(x.to(torch.float32))) > TOLERANCE


@pytest.mark.parametrize(
    ("kept", "dtype"),
    [
        (linear(), torch.float32),
        (linear(bits=8), torch.bfloat16),
        (linear(group_size=4), torch.bfloat16),
        (linear(outputs=20), torch.bfloat16),
    ],
    ids=["float32", "eight bits", "small groups", "odd outputs"],
)
def test_what_the_kernel_would_round_or_does_not_take_stays(kept: QuantizedLinear, dtype: torch.dtype) -> None:
    assert carrier_of(kept, dtype) is kept


def test_a_layer_that_only_carries_gets_faster_parts_and_keeps_the_rest() -> None:
    block = Block()
    carry_faster(block, torch.bfloat16)
    assert isinstance(block.o_proj, CarryingLinear)
    assert isinstance(block.attend, NativeAttention)
    assert isinstance(block.norm, nn.LayerNorm)
