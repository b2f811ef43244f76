"""The prepared head against the plain product it stands for."""

from __future__ import annotations

import pytest
import torch

from quant.int4_linear import KernelName, probe_kernel, relative_error
from quant.native.linear import is_native_right
from serving.engine.prepare import INT8_HEAD_MAX_ROWS, FastHead, NativeHead

pytestmark = pytest.mark.unit


def error_of_head(group_size: int | None, num_rows: int, *, broken: bool = False) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5000, 64, generator=generator).to(torch.bfloat16)  # more than one block, the last one short
    hidden = torch.randn(num_rows, 64, generator=generator).to(torch.bfloat16)
    head = FastHead(weight[:4992], group_size)
    if broken:
        weight = weight.roll(1, dims=0)
    return relative_error(head(hidden), hidden.to(torch.float32) @ weight[:4992].to(torch.float32).t())


@pytest.mark.parametrize("num_rows", [1, INT8_HEAD_MAX_ROWS, INT8_HEAD_MAX_ROWS + 1, 40])
@pytest.mark.parametrize("group_size", [None, 32, 64])
def test_few_and_many_rows_get_the_same_logits_to_rounding(group_size: int | None, num_rows: int) -> None:
    if group_size is not None and probe_kernel() is not KernelName.TORCH_INT4PACK:
        group_size = None
    assert error_of_head(group_size, num_rows) < 0.012
    assert error_of_head(group_size, num_rows, broken=True) > 0.012


@pytest.mark.skipif(not is_native_right(), reason="no native kernels on this machine")
@pytest.mark.parametrize("num_rows", [1, 7])
@pytest.mark.parametrize("vocab_size", [4992, 4097])
def test_native_head_gives_the_same_logits_to_rounding(num_rows: int, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab_size, 64, generator=generator).to(torch.bfloat16)
    hidden = torch.randn(num_rows, 64, generator=generator).to(torch.bfloat16)
    expected = hidden.to(torch.float32) @ weight.to(torch.float32).t()
    assert relative_error(NativeHead(weight, 32)(hidden), expected) < 0.012
    assert relative_error(NativeHead(weight.roll(1, dims=0), 32)(hidden), expected) > 0.012
