"""The native product against its twin. Runs again on the other code paths (test_native_step.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from quant.errors import QuantizationError
from quant.int4_linear import KernelName, PlainKernel, build_kernel, relative_error
from quant.method.matrix import QuantizedMatrix
from quant.native import linear
from quant.native.linear import NATIVE_RELATIVE_TOLERANCE, NativeLinear, native_twin, why_not_native

pytestmark = pytest.mark.unit

needs_library = pytest.mark.skipif(linear.load_library() is None, reason="no native kernels on this machine")


def random_matrix(
    out_features: int, in_features: int, group_size: int, bits: int, *, symmetric: bool = False
) -> QuantizedMatrix:
    generator = torch.Generator().manual_seed(0)
    groups, top = (out_features, in_features // group_size), 1 << bits
    zeros = torch.randint(1, top, groups, dtype=torch.uint8, generator=generator)
    return QuantizedMatrix(
        codes=torch.randint(0, top, (out_features, in_features), dtype=torch.uint8, generator=generator),
        scales=(torch.rand(groups, generator=generator) * 0.02 + 0.01).to(torch.float16).to(torch.float32),
        zeros=torch.full_like(zeros, top // 2) if symmetric else zeros,
        bits=bits,
        group_size=group_size,
    )


def random_rows(rows: int, in_features: int) -> Tensor:
    return torch.randn((rows, in_features), generator=torch.Generator().manual_seed(1))


@needs_library
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("rows", [1, 4, 11])
def test_product_equals_its_twin(bits: int, symmetric: bool, group_size: int, rows: int) -> None:
    matrix = random_matrix(48, 512, group_size, bits, symmetric=symmetric)
    bias = torch.linspace(-1, 1, 48)
    x = random_rows(rows, 512)
    expected = native_twin(matrix, x) + bias
    assert relative_error(NativeLinear(matrix, bias)(x), expected) <= NATIVE_RELATIVE_TOLERANCE


@needs_library
def test_largest_sums_do_not_overflow() -> None:
    for bits in (4, 8):
        matrix = random_matrix(16, 256, 256, bits)
        # Every third of other sizes: 8-bit codes that are evenly spaced would be served in 4 bits.
        codes = torch.full_like(matrix.codes, (1 << bits) - 1)
        codes[:, ::3] = torch.randint_like(codes[:, ::3], 1 << bits)
        matrix = replace(matrix, codes=codes)
        x = torch.ones(1, 256)
        assert relative_error(NativeLinear(matrix, None)(x), native_twin(matrix, x)) <= NATIVE_RELATIVE_TOLERANCE


@needs_library
def test_bfloat16_rows_give_the_product_rounded_once() -> None:
    matrix = random_matrix(32, 128, 32, 4)
    x = random_rows(5, 128).to(torch.bfloat16)
    kernel = NativeLinear(matrix, None)
    assert torch.equal(kernel(x), kernel(x.to(torch.float32)).to(torch.bfloat16))
    assert torch.equal(kernel.to_float32(x), kernel(x.to(torch.float32)))


def with_wrong_scale(matrix: QuantizedMatrix) -> QuantizedMatrix:
    scales = matrix.scales.clone()
    scales[3, 1] *= 1.1
    return replace(matrix, scales=scales)


def with_wrong_zero(matrix: QuantizedMatrix) -> QuantizedMatrix:
    zeros = matrix.zeros.clone()
    zeros[3, 1] = zeros[3, 1] % 15 + 1
    return replace(matrix, zeros=zeros)


def with_neighbouring_groups_exchanged(matrix: QuantizedMatrix) -> QuantizedMatrix:
    order = [1, 0, *range(2, matrix.scales.shape[1])]
    return replace(matrix, scales=matrix.scales[:, order].contiguous(), zeros=matrix.zeros[:, order].contiguous())


def with_two_codes_exchanged(matrix: QuantizedMatrix) -> QuantizedMatrix:
    order = [0, 5, 2, 3, 4, 1, *range(6, matrix.in_features)]
    return replace(matrix, codes=matrix.codes[:, order].contiguous())


@needs_library
@pytest.mark.parametrize(
    "damage", [with_wrong_scale, with_wrong_zero, with_neighbouring_groups_exchanged, with_two_codes_exchanged]
)
@pytest.mark.parametrize("bits", [4, 8])
def test_tolerance_notices_damage(damage: Callable[[QuantizedMatrix], QuantizedMatrix], bits: int) -> None:
    matrix = random_matrix(32, 128, 32, bits)
    x = random_rows(9, 128)
    found = NativeLinear(damage(matrix), None)(x)
    assert relative_error(found, native_twin(matrix, x)) > NATIVE_RELATIVE_TOLERANCE


@needs_library
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_is_the_same_alone_in_company_and_with_more_threads(bits: int) -> None:
    matrix = random_matrix(208, 256, 64, bits)
    kernel, x = NativeLinear(matrix, None), random_rows(21, 256)
    alone = torch.cat([kernel(row.unsqueeze(0)) for row in x])
    num_threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for _ in range(20):
                assert torch.equal(kernel(x), alone)
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("bits", [4, 8])
def test_int8_activations_cost_less_than_one_percent_of_a_product(bits: int) -> None:
    matrix, x = random_matrix(64, 512, 32, bits, symmetric=True), random_rows(16, 512)
    assert relative_error(native_twin(matrix, x), x @ matrix.dequantize().t()) < 0.01


@needs_library
def test_a_row_of_zeros_gives_the_bias() -> None:
    bias = torch.linspace(-1, 1, 32)
    kernel = NativeLinear(random_matrix(32, 64, 32, 4), bias)
    assert torch.equal(kernel(torch.zeros(2, 64)), bias.expand(2, -1))


@pytest.mark.parametrize(
    ("matrix", "reason"), [(random_matrix(32, 96, 48, 4), "group sizes"), (random_matrix(24, 64, 32, 4), "outputs")]
)
def test_matrices_the_product_does_not_take_get_the_plain_kernel(matrix: QuantizedMatrix, reason: str) -> None:
    assert reason in (why_not_native(matrix) or "")
    with pytest.raises(QuantizationError, match=reason):
        NativeLinear(matrix, None)
    assert isinstance(build_kernel(matrix, None, KernelName.NATIVE), PlainKernel)


@needs_library
def test_self_check_refuses_kernels_that_are_wrong(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pack = linear.pack_codes

    def pack_wrongly(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
        return pack(np.roll(codes, 1, axis=1), bits)

    monkeypatch.setattr(linear, "pack_codes", pack_wrongly)
    assert not linear.is_native_right.__wrapped__()
    assert "native_self_check passed=no" in caplog.text


def test_no_library_means_no_native_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "load_library", lambda: None)
    assert not linear.is_native_right.__wrapped__()
    with pytest.raises(QuantizationError, match="not available"):
        NativeLinear(random_matrix(32, 64, 32, 4), None)
