"""Each product against the dequantised weight of bitsandbytes itself, and the tolerance shown to fail."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from torch import Tensor

from quant import bitsandbytes_linear
from quant.bitsandbytes_linear import Int8Kernel, LoadIn, Nf4Kernel, announce_bitsandbytes, build_bitsandbytes_kernel
from quant.errors import QuantizationError
from quant.int4_linear import relative_error

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
# NF4 rounds the result to bf16 only; int8 rounds every input to 1/127 of its row's largest as well.
TOLERANCES = {LoadIn.NF4: 4e-3, LoadIn.INT8: 1.2e-2}


def weight_of(out_features: int, in_features: int) -> Tensor:
    return torch.randn((out_features, in_features), generator=torch.Generator().manual_seed(1)) * 0.05


def inputs_of(rows: int, in_features: int) -> Tensor:
    return torch.randn((rows, in_features), generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)


def twin_product(kernel: Nf4Kernel | Int8Kernel, x: Tensor, bias: Tensor) -> Tensor:
    return x.to(torch.float32) @ kernel.twin_weight().t() + bias


@pytest.mark.parametrize("load_in", list(LoadIn))
@pytest.mark.parametrize(("rows", "out_features", "in_features"), [(1, 96, 128), (7, 40, 64), (33, 24, 96)])
@torch.inference_mode()
def test_product_is_that_of_the_dequantised_weight(
    load_in: LoadIn, rows: int, out_features: int, in_features: int
) -> None:
    bias = torch.linspace(-1, 1, out_features)
    x = inputs_of(rows, in_features)
    kernel = build_bitsandbytes_kernel(weight_of(out_features, in_features), bias, load_in)
    found, expected = kernel(x), twin_product(kernel, x, bias)
    assert (found.dtype, tuple(found.shape)) == (x.dtype, (rows, out_features))
    assert (kernel.out_features, kernel.in_features) == (out_features, in_features)
    assert relative_error(found, expected) < TOLERANCES[load_in]


@pytest.mark.parametrize("load_in", list(LoadIn))
@torch.inference_mode()
def test_a_scale_that_is_wrong_by_a_fiftieth_is_more_than_the_tolerance(load_in: LoadIn) -> None:
    kernel = build_bitsandbytes_kernel(weight_of(96, 128), None, load_in)
    x = inputs_of(5, 128)
    wrong = x.to(torch.float32) @ (kernel.twin_weight() * 1.02).t()
    assert relative_error(kernel(x), wrong) > TOLERANCES[load_in]


@pytest.mark.parametrize(("load_in", "allowed"), [(LoadIn.NF4, 0.11), (LoadIn.INT8, 0.01)])
def test_the_weight_is_about_what_it_was(load_in: LoadIn, allowed: float) -> None:
    weight = weight_of(96, 128)
    assert relative_error(build_bitsandbytes_kernel(weight, None, load_in).twin_weight(), weight) < allowed


@pytest.mark.parametrize("load_in", list(LoadIn))
@torch.inference_mode()
def test_a_row_is_the_same_alone_and_beside_others(load_in: LoadIn) -> None:
    kernel = build_bitsandbytes_kernel(weight_of(96, 128), None, load_in)
    x = inputs_of(4, 128)
    x[2] *= 100  # an outlier in one row is nobody else's matter
    # The last bit may differ: another number of rows is another order of summation.
    assert torch.allclose(kernel(x)[:1], kernel(x[:1]), rtol=2e-2, atol=2e-3)


def test_where_it_runs_and_how_fast_is_one_log_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bitsandbytes_linear, "_device", lambda: CPU)
    with caplog.at_level(logging.INFO):
        announce_bitsandbytes(LoadIn.NF4)
    assert "load_in name=nf4" in caplog.text
    assert "slow_on_a_cpu" in caplog.text


def test_without_bitsandbytes_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(QuantizationError, match=r"pip install 'causerie\[gpu\]'"):
        announce_bitsandbytes(LoadIn.INT8)
