"""Attention over whole texts in C against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.int4_linear import relative_error
from quant.native.attention import faster_attention
from quant.native.library import load_library

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(load_library() is None, reason="no native kernels on this machine"),
]

# Scores and weights are rounded to bf16 on some processors, and the result is.
TOLERANCE = 4e-3


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Step by step in float32."""
    shared = q.shape[1] // k.shape[1]
    k, v = (part.to(torch.float32).repeat_interleave(shared, dim=1) for part in (k, v))
    scores = q.to(torch.float32) @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu_(1)
    return torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1) @ v


def draw(length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn((2, length, count, head_dim), generator=generator).to(dtype).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("length", [1, 15, 16, 37, 300])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 32), (8, 1, 128)])
def test_texts_are_attended_to_as_the_twin_does(length: int, heads: int, kv_heads: int, head_dim: int) -> None:
    q, k, v = draw(length, heads, kv_heads, head_dim)
    found = faster_attention(plain)(q, k, v, None)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, plain(q, k, v)) <= TOLERANCE


def test_what_the_kernel_does_not_take_goes_to_the_plain_way() -> None:
    for q, k, v in (draw(9, 4, 2, 64, torch.float32), draw(9, 4, 2, 24)):
        assert torch.equal(faster_attention(plain)(q, k, v, None), plain(q, k, v))
    q, k, v = draw(9, 4, 2, 64)
    bias = torch.linspace(-2, 2, 4 * 9 * 9).view(4, 9, 9)
    assert torch.equal(faster_attention(plain)(q, k, v, bias), plain(q, k, v, bias))
