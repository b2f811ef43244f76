"""8-bit matrices on 16 levels: found where they are, left alone elsewhere. Also runs on the AVX2 code paths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant.int4_linear import relative_error
from quant.method.gptq import GptqOptions, round_to_nearest
from quant.method.matrix import QuantizedMatrix
from quant.native.levels import MAX_RELATIVE_ERROR, find_levels, search_levels_plainly
from quant.native.library import load_library
from quant.native.linear import NATIVE_RELATIVE_TOLERANCE, NativeLinear, native_twin, quantize_activations

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(load_library() is None, reason="no native kernels on this machine"),
]

OUT, IN, GROUP = 48, 256, 32
EIGHT_BITS = GptqOptions(bits=8, group_size=GROUP)


def four_bit_weight(generator: torch.Generator, *, num_levels: int = 16) -> Tensor:
    """(OUT, IN) float16: as a Q4_1 file holds it, with a minimum of its own for each group of 32."""
    levels = torch.randint(0, num_levels, (OUT, IN // GROUP, GROUP), generator=generator)
    steps = torch.rand(OUT, IN // GROUP, 1, generator=generator) * 0.05 + 0.01
    lowest = -steps * num_levels * torch.rand(OUT, IN // GROUP, 1, generator=generator)
    return (levels * steps + lowest).flatten(1).to(torch.float16)


def reached(matrix: QuantizedMatrix) -> Tensor:
    found = find_levels(matrix)
    assert found is not None
    return found.dequantize()


@pytest.mark.parametrize("num_levels", [16, 11, 5])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_levels_of_a_four_bit_source_are_found_again(num_levels: int, symmetric: bool) -> None:
    weight = four_bit_weight(torch.Generator().manual_seed(0), num_levels=num_levels).to(torch.float32)
    matrix = round_to_nearest(weight, replace(EIGHT_BITS, symmetric=symmetric))
    # Nearer to what the file was made from than the file is.
    assert relative_error(reached(matrix), weight) < relative_error(matrix.dequantize(), weight)


@pytest.mark.parametrize("num_levels", [2, 1])
def test_two_values_or_one_are_levels_too(num_levels: int) -> None:
    weight = four_bit_weight(torch.Generator().manual_seed(0), num_levels=num_levels).to(torch.float32)
    matrix = round_to_nearest(weight, EIGHT_BITS)
    assert relative_error(reached(matrix), matrix.dequantize()) < 5e-4  # fp16


def test_codes_moved_by_error_feedback_are_near_enough() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = round_to_nearest(four_bit_weight(generator).to(torch.float32), EIGHT_BITS)
    moved = matrix.codes.to(torch.int16) + torch.randint(-1, 2, matrix.codes.shape, generator=generator)
    matrix = replace(matrix, codes=moved.clamp(0, 255).to(torch.uint8))
    assert relative_error(reached(matrix), matrix.dequantize()) <= MAX_RELATIVE_ERROR


def test_any_other_matrix_stays_in_eight_bits() -> None:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))
    matrix = round_to_nearest(weight, EIGHT_BITS)
    assert find_levels(matrix) is None
    assert NativeLinear(matrix, None).num_bytes > OUT * IN


def test_one_row_that_is_not_on_levels_keeps_the_whole_matrix_as_it_is() -> None:
    matrix = round_to_nearest(four_bit_weight(torch.Generator().manual_seed(3)).to(torch.float32), EIGHT_BITS)
    codes = matrix.codes.clone()
    codes[1] = torch.randint(0, 256, (IN,), dtype=torch.uint8)  # not one of the rows that are tried first
    assert find_levels(matrix) is not None
    assert find_levels(replace(matrix, codes=codes)) is None


@pytest.mark.parametrize("size", [32, 64, 128])
def test_the_search_equals_its_twin(size: int) -> None:
    generator = torch.Generator().manual_seed(4)
    levels = torch.randint(0, 16, (200, size), generator=generator)
    steps = torch.rand(200, 1, generator=generator) * 12 + 0.1
    codes = (levels * steps + torch.rand(200, 1, generator=generator) * 60).round().to(torch.uint8)
    matrix = QuantizedMatrix(codes, torch.ones(200, 1), torch.full((200, 1), 128, dtype=torch.uint8), 8, size)
    values, _ = search_levels_plainly(codes)
    # Sums in another order may choose another line that is as good; the values differ by fp16 as well.
    assert relative_error(reached(matrix) + 128, values) < 2e-3


@pytest.mark.parametrize("rows", [1, 3, 4, 11])
def test_product_of_levels_equals_rounded_activations_times_them(rows: int) -> None:
    generator = torch.Generator().manual_seed(5)
    matrix = round_to_nearest(four_bit_weight(generator).to(torch.float32), EIGHT_BITS)
    x, bias = torch.randn(rows, IN, generator=generator), torch.linspace(-1, 1, OUT)
    kernel = NativeLinear(matrix, bias)
    codes, scales = quantize_activations(x, GROUP)
    expected = (codes * scales).flatten(1) @ reached(matrix).t() + bias
    assert relative_error(kernel(x), expected) <= NATIVE_RELATIVE_TOLERANCE
    assert relative_error(kernel(x), native_twin(matrix, x) + bias) <= MAX_RELATIVE_ERROR
    assert kernel.num_bytes == OUT * IN // 2 + 2 * 2 * OUT * IN // GROUP


def test_a_row_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(6)
    kernel = NativeLinear(round_to_nearest(four_bit_weight(generator).to(torch.float32), EIGHT_BITS), None)
    x = torch.randn(9, IN, generator=generator)
    assert torch.equal(kernel(x), torch.cat([kernel(row.unsqueeze(0)) for row in x]))
