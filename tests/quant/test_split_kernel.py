"""8-bit matrices through two packed 4-bit products, against the dequantised twin."""

from __future__ import annotations

import pytest
import torch

from quant.int4_linear import KernelName, SplitInt4PackKernel, build_kernel, probe_kernel, relative_error
from quant.method.matrix import QuantizedMatrix

pytestmark = pytest.mark.unit

# Two bf16 roundings of the products and one of the scale.
TOLERANCE = 6e-3


def make_matrix(*, symmetric: bool, seed: int = 0) -> QuantizedMatrix:
    generator = torch.Generator().manual_seed(seed)
    groups = (48, 4)
    zeros = torch.full(groups, 128) if symmetric else torch.randint(90, 166, groups, generator=generator)
    return QuantizedMatrix(
        codes=torch.randint(0, 256, (48, 128), dtype=torch.uint8, generator=generator),
        scales=(torch.rand(groups, generator=generator) * 0.01 + 0.001).to(torch.float16).to(torch.float32),
        zeros=zeros.to(torch.uint8),
        bits=8,
        group_size=32,
    )


def error_of(kernel_matrix: QuantizedMatrix, twin_matrix: QuantizedMatrix, rows: int = 5) -> float:
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    bias = torch.linspace(-1, 1, 48)
    found = SplitInt4PackKernel(kernel_matrix, bias)(x)
    return relative_error(found, x.to(torch.float32) @ twin_matrix.dequantize().t() + bias)


@pytest.mark.skipif(probe_kernel() is not KernelName.TORCH_INT4PACK, reason="this processor has no packed product")
class TestSplitKernel:
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("rows", [1, 5, 40])
    def test_it_agrees_with_the_twin(self, symmetric: bool, rows: int) -> None:
        matrix = make_matrix(symmetric=symmetric)
        assert error_of(matrix, matrix, rows) < TOLERANCE

    def test_a_wrong_scale_zero_or_group_breaks_the_tolerance(self) -> None:
        matrix = make_matrix(symmetric=False)
        scales, zeros, codes = matrix.scales.clone(), matrix.zeros.clone(), matrix.codes.clone()
        scales[:, 1] *= 1.05
        zeros[:, 2] += 2
        codes[:, :32] = codes[:, 32:64]
        for broken in (
            QuantizedMatrix(matrix.codes, scales, matrix.zeros, 8, 32),
            QuantizedMatrix(matrix.codes, matrix.scales, zeros, 8, 32),
            QuantizedMatrix(codes, matrix.scales, matrix.zeros, 8, 32),
        ):
            assert error_of(broken, matrix, rows=5) > TOLERANCE
            assert error_of(broken, matrix, rows=40) > TOLERANCE

    def test_it_is_what_8_bit_matrices_get(self) -> None:
        kernel = build_kernel(make_matrix(symmetric=True), None, KernelName.TORCH_INT4PACK)
        assert isinstance(kernel, SplitInt4PackKernel)
