"""The prepared head against the plain product it stands for."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import nn

from quant.bitsandbytes_linear import LoadIn
from quant.errors import CheckpointError
from quant.int4_linear import KernelName, QuantizedLinear, probe_kernel, relative_error
from quant.method.gptq import GptqOptions, round_to_nearest
from quant.native.linear import is_native_right
from serving.engine.logits import serving_logits
from serving.engine.prepare import INT8_HEAD_MAX_ROWS, FastHead, NativeHead, prepare
from tests.serving.engine.tiny import make_decoder, prompt_of

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


@pytest.mark.parametrize(("load_in", "allowed"), [(LoadIn.NF4, 0.25), (LoadIn.INT8, 0.05)])
def test_weights_rounded_while_loading_predict_about_what_the_plain_ones_do(load_in: LoadIn, allowed: float) -> None:
    decoder = make_decoder()
    ids = torch.tensor(prompt_of(24))
    prepared = prepare(decoder, exact=False, load_in=load_in)
    assert prepared.kernel_name is load_in.kernel_name
    expected = serving_logits(prepare(decoder, exact=True), ids)
    error = relative_error(serving_logits(prepared, ids), expected)
    assert 0 < error < allowed


def test_a_quantised_model_is_not_rounded_again_while_loading() -> None:
    decoder = make_decoder()
    linear = decoder.get_submodule("model.layers.0.mlp.down_proj")
    matrix = round_to_nearest(cast("nn.Linear", linear).weight, GptqOptions(group_size=16))
    decoder.get_submodule("model.layers.0.mlp").down_proj = QuantizedLinear(matrix)
    with pytest.raises(CheckpointError, match="quantised already, and load_in = nf4 rounds plain weights"):
        prepare(decoder, exact=False, load_in=LoadIn.NF4)
