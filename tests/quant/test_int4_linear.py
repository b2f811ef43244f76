"""The fast products against their twin. The whole file runs a second time on the AVX2 code paths (last test)."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant import int4_linear
from quant.errors import QuantizationError
from quant.int4_linear import (
    INT4PACK_RELATIVE_TOLERANCE,
    Int4PackKernel,
    KernelName,
    PlainKernel,
    QuantizedLinear,
    SplitInt4PackKernel,
    build_kernel,
    int4pack_twin_weight,
    probe_kernel,
    relative_error,
    why_not_int4pack,
)
from quant.method.matrix import QuantizedMatrix
from quant.native.linear import why_not_native

pytestmark = pytest.mark.unit

needs_operator = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in int4_linear.INT4PACK_CPU_CAPABILITIES,
    reason="this processor has no vectorised int4 operator; the plain path serves",
)


def random_matrix(
    out_features: int, in_features: int, group_size: int, *, bits: int = 4, symmetric: bool = False, seed: int = 0
) -> QuantizedMatrix:
    generator = torch.Generator().manual_seed(seed)
    groups = (out_features, in_features // group_size)
    top = 1 << bits
    zeros = torch.randint(1, top, groups, dtype=torch.uint8, generator=generator)
    return QuantizedMatrix(
        codes=torch.randint(0, top, (out_features, in_features), dtype=torch.uint8, generator=generator),
        scales=(torch.rand(groups, generator=generator) * 0.02 + 0.01).to(torch.float16).to(torch.float32),
        zeros=torch.full_like(zeros, top // 2) if symmetric else zeros,
        bits=bits,
        group_size=group_size,
    )


def random_rows(rows: int, in_features: int, seed: int = 1) -> Tensor:
    return torch.randn((rows, in_features), generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def shuffled(matrix: QuantizedMatrix) -> QuantizedMatrix:
    order = torch.randperm(matrix.in_features, generator=torch.Generator().manual_seed(2))
    return replace(matrix, group_of_input=(order // matrix.group_size).to(torch.int32))


@pytest.mark.parametrize("name", KernelName)
@pytest.mark.parametrize("bits", [4, 8])
def test_shuffled_inputs_take_the_plain_product(name: KernelName, bits: int) -> None:
    matrix, x = shuffled(random_matrix(32, 128, 32, bits=bits)), random_rows(3, 128).to(torch.float32)
    kernel = build_kernel(matrix, None, name)
    assert isinstance(kernel, PlainKernel)
    assert torch.equal(kernel(x), x @ matrix.dequantize().t())


def test_fast_products_say_why_they_refuse_shuffled_inputs() -> None:
    matrix = shuffled(random_matrix(32, 128, 32))
    for reason in (why_not_int4pack(matrix), why_not_native(matrix)):
        assert reason is not None
        assert "not grouped in order" in reason
    with pytest.raises(QuantizationError, match="not grouped in order"):
        Int4PackKernel(matrix, None)
    with pytest.raises(QuantizationError, match="not grouped in order"):
        SplitInt4PackKernel(shuffled(random_matrix(32, 128, 32, bits=8)), None)


def product(matrix: QuantizedMatrix, x: Tensor) -> Tensor:
    return x.to(torch.float32) @ int4pack_twin_weight(matrix).t()


@needs_operator
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("rows", [1, 4, 37])
@pytest.mark.parametrize("out_features", [16, 48, 208])
def test_packed_product_equals_its_twin(group_size: int, rows: int, out_features: int) -> None:
    matrix = random_matrix(out_features, 512, group_size)
    x = random_rows(rows, 512)
    assert relative_error(Int4PackKernel(matrix, None)(x), product(matrix, x)) <= INT4PACK_RELATIVE_TOLERANCE


@needs_operator
def test_packed_product_of_a_symmetric_matrix_with_bf16_scales_equals_the_reference_module() -> None:
    matrix = random_matrix(64, 256, 64, symmetric=True)
    matrix = replace(matrix, scales=matrix.scales.to(torch.bfloat16).to(torch.float32))
    bias = torch.linspace(-1, 1, 64).to(torch.bfloat16).to(torch.float32)
    x = random_rows(5, 256)
    reference = QuantizedLinear(matrix, bias)(x.to(torch.float32))
    # The bias is added to a product already rounded to bf16, hence a second rounding.
    assert relative_error(Int4PackKernel(matrix, bias)(x), reference) <= 1.5 * INT4PACK_RELATIVE_TOLERANCE


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


@needs_operator
@pytest.mark.parametrize("damage", [with_wrong_scale, with_wrong_zero, with_neighbouring_groups_exchanged])
def test_tolerance_notices_a_wrong_scale_zero_or_group(damage: object) -> None:
    assert callable(damage)
    matrix = random_matrix(32, 128, 32)
    x = random_rows(9, 128)
    damaged = damage(matrix)
    assert isinstance(damaged, QuantizedMatrix)
    assert relative_error(Int4PackKernel(damaged, None)(x), product(matrix, x)) > INT4PACK_RELATIVE_TOLERANCE


def test_twin_weight_differs_from_the_exact_one_only_by_bf16_rounding() -> None:
    matrix = random_matrix(32, 128, 32)
    assert relative_error(int4pack_twin_weight(matrix), matrix.dequantize()) < 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_kernel_equals_the_reference_module(dtype: torch.dtype) -> None:
    matrix = random_matrix(24, 96, 32, bits=8)
    bias = torch.arange(24, dtype=torch.float32)
    x = random_rows(3, 96).to(dtype)
    assert torch.equal(PlainKernel(matrix, bias, dtype)(x), QuantizedLinear(matrix, bias)(x))


def test_reference_module_multiplies_by_the_dequantised_weight() -> None:
    matrix = QuantizedMatrix(
        codes=torch.tensor([[1, 2, 3, 15]], dtype=torch.uint8),
        scales=torch.tensor([[0.5, 2.0]]),
        zeros=torch.tensor([[2, 8]], dtype=torch.uint8),
        bits=4,
        group_size=2,
    )
    # Weight: (1-2)*0.5, (2-2)*0.5, (3-8)*2, (15-8)*2 = -0.5, 0, -10, 14
    assert QuantizedLinear(matrix)(torch.tensor([[1.0, 10.0, 1.0, 1.0]])).item() == 3.5


@pytest.mark.parametrize(
    ("matrix", "reason"),
    [
        (random_matrix(32, 96, 96), "group sizes"),
        (random_matrix(24, 64, 32), "multiples of 16"),
    ],
)
def test_matrices_the_operator_does_not_take_get_the_plain_kernel(matrix: QuantizedMatrix, reason: str) -> None:
    assert reason in (why_not_int4pack(matrix) or "")
    assert isinstance(build_kernel(matrix, None, KernelName.TORCH_INT4PACK), PlainKernel)


@needs_operator
def test_probe_chooses_the_operator_where_it_is_right_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="quant.int4_linear")
    assert probe_kernel() is KernelName.TORCH_INT4PACK
    assert [record.message.split()[1] for record in caplog.records] == ["name=torch_int4pack"]


@needs_operator
def test_probe_refuses_an_operator_with_another_zero_convention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_linear, "INT4PACK_CENTRE", 7)
    monkeypatch.setattr(int4_linear, "int4pack_twin_weight", lambda matrix: matrix.dequantize())  # pyright: ignore
    assert probe_kernel() is KernelName.PLAIN


def test_probe_takes_the_plain_path_where_the_operator_is_scalar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert probe_kernel() is KernelName.PLAIN


def test_probe_takes_the_plain_path_where_the_operator_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(matrix: QuantizedMatrix, bias: Tensor | None) -> Int4PackKernel:
        raise NotImplementedError("no such operator on this machine")

    monkeypatch.setattr(int4_linear, "Int4PackKernel", fail)
    assert probe_kernel() is KernelName.PLAIN


@needs_operator
@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="already running on a chosen capability")
def test_this_file_passes_on_the_avx2_code_paths() -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:]
