"""What a quantised matrix becomes in GGUF, against the `gguf` package's dequantiser."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as GgmlType

from quant.convert.export import linear_rows
from quant.errors import CheckpointError
from quant.method.matrix import QuantizedMatrix
from tests.quant.random_matrix import random_matrix

pytestmark = pytest.mark.unit


def package_values(type_name: str, rows: np.ndarray) -> np.ndarray:
    return gguf.dequantize(rows, GgmlType[type_name])


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("bits", "type_name"), [(4, "Q4_0"), (8, "Q8_0")])
def test_symmetric_codes_are_moved_bit_for_bit(bits: int, type_name: str, group_size: int) -> None:
    matrix = random_matrix(bits, group_size, symmetric=True)
    found, rows = linear_rows("linear", matrix)
    assert found == type_name
    np.testing.assert_array_equal(package_values(found, rows), matrix.dequantize().numpy())


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_asymmetric_codes_keep_all_but_the_rounding_of_their_minimum(group_size: int) -> None:
    matrix = random_matrix(4, group_size, symmetric=False)
    found, rows = linear_rows("linear", matrix)
    assert found == "Q4_1"
    values, exact = package_values(found, rows), matrix.dequantize().numpy()
    minimums = (matrix.scales * matrix.zeros).numpy()
    error = np.abs(minimums - minimums.astype(np.float16).astype(np.float32))
    bound = np.repeat(error, group_size, axis=1) + 1e-7
    assert (np.abs(values - exact) <= bound).all()
    assert np.abs(values - exact).max() > 0


@pytest.mark.parametrize(
    "matrix", [random_matrix(8, 32, symmetric=False), random_matrix(4, 16, symmetric=True, columns=48)]
)
def test_what_no_block_expresses_becomes_float16(matrix: QuantizedMatrix) -> None:
    found, rows = linear_rows("linear", matrix)
    assert found == "F16"
    np.testing.assert_allclose(rows.astype(np.float32), matrix.dequantize().numpy(), rtol=2**-11, atol=2**-24)


def with_groups(matrix: QuantizedMatrix, group_of_input: torch.Tensor) -> QuantizedMatrix:
    return replace(matrix, group_of_input=group_of_input.to(torch.int32))


def test_true_act_order_is_refused_with_the_reason() -> None:
    matrix = random_matrix(4, 32, symmetric=True)
    shuffled = with_groups(matrix, torch.randperm(128, generator=torch.Generator().manual_seed(0)) // 32)
    with pytest.raises(CheckpointError, match=r"layer.q_proj is quantised in shuffled act-order.*--act-order"):
        linear_rows("layer.q_proj", shuffled)


def test_short_last_group_is_expressed_where_it_is_whole_blocks() -> None:
    matrix = random_matrix(4, 64, symmetric=True)
    uneven = with_groups(matrix, (torch.arange(128) >= 96).to(torch.int32))
    found, rows = linear_rows("linear", uneven)
    assert found == "Q4_0"
    np.testing.assert_array_equal(package_values(found, rows), uneven.dequantize().numpy())
    assert linear_rows("linear", with_groups(matrix, (torch.arange(128) >= 100).to(torch.int32)))[0] == "F16"
