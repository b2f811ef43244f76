from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant.method.matrix import QuantizedMatrix, concat_rows, have_equal_groups, split_rows

pytestmark = pytest.mark.unit


def small_matrix(rows: int = 2) -> QuantizedMatrix:
    return QuantizedMatrix(
        codes=torch.arange(rows * 4, dtype=torch.uint8).view(rows, 4),
        scales=torch.full((rows, 2), 0.5),
        zeros=torch.full((rows, 2), 2, dtype=torch.uint8),
        bits=4,
        group_size=2,
    )


def test_weight_is_code_minus_zero_times_scale_of_its_group() -> None:
    matrix = QuantizedMatrix(
        codes=torch.tensor([[0, 15, 3, 3]], dtype=torch.uint8),
        scales=torch.tensor([[1.0, -0.5]]),
        zeros=torch.tensor([[8, 1]], dtype=torch.uint8),
        bits=4,
        group_size=2,
    )
    assert matrix.dequantize().tolist() == [[-8.0, 7.0, -1.0, -1.0]]


def test_a_weight_whose_inputs_are_shuffled_takes_the_scale_that_its_input_names() -> None:
    matrix = QuantizedMatrix(
        codes=torch.tensor([[0, 15, 3, 3]], dtype=torch.uint8),
        scales=torch.tensor([[1.0, -0.5]]),
        zeros=torch.tensor([[8, 1]], dtype=torch.uint8),
        bits=4,
        group_size=2,
        group_of_input=torch.tensor([1, 0, 1, 0], dtype=torch.int32),
    )
    assert matrix.dequantize().tolist() == [[0.5, 7.0, -1.0, -5.0]]


def test_matrices_stack_only_with_inputs_grouped_alike() -> None:
    trivial = small_matrix()
    shuffled = replace(trivial, group_of_input=torch.tensor([1, 0, 0, 1], dtype=torch.int32))
    other = replace(trivial, group_of_input=torch.tensor([0, 1, 0, 1], dtype=torch.int32))
    first, second = split_rows(concat_rows([shuffled, shuffled]), [1, 3])
    assert torch.equal(torch.cat([first.dequantize(), second.dequantize()]), shuffled.dequantize().repeat(2, 1))
    assert have_equal_groups([shuffled, shuffled])
    for wrong in (trivial, other):
        assert not have_equal_groups([shuffled, wrong])
        with pytest.raises(ValueError, match="grouped in different orders"):
            concat_rows([shuffled, wrong])


@pytest.mark.parametrize(
    ("group_of_input", "complaint"),
    [
        (torch.tensor([0, 1, 2, 0], dtype=torch.int32), r"must lie in 0\.\.1; found 0\.\.2"),
        (torch.tensor([0, 1, -1, 0], dtype=torch.int32), r"found -1\.\.1"),
        (torch.tensor([0, 1, 0], dtype=torch.int32), r"must be \(4,\) int32"),
        (torch.tensor([0, 1, 0, 1]), "int64"),
    ],
)
def test_groups_that_do_not_exist_are_refused(group_of_input: torch.Tensor, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(small_matrix(), group_of_input=group_of_input)


def test_splitting_undoes_stacking() -> None:
    stacked = concat_rows([small_matrix(1), small_matrix(3)])
    first, second = split_rows(stacked, [1, 3])
    assert torch.equal(first.dequantize(), small_matrix(1).dequantize())
    assert torch.equal(second.dequantize(), small_matrix(3).dequantize())


def test_matrices_of_different_grids_do_not_stack() -> None:
    zeros = torch.zeros((1, 4), dtype=torch.uint8)
    other = QuantizedMatrix(zeros, torch.ones((1, 1)), zeros[:, :1], 4, 4)
    with pytest.raises(ValueError, match="group size"):
        concat_rows([small_matrix(), other])


def test_scales_that_do_not_fit_the_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="scales and zeros must be"):
        QuantizedMatrix(
            torch.zeros((2, 4), dtype=torch.uint8), torch.ones((2, 4)), torch.ones((2, 4), dtype=torch.uint8), 4, 2
        )


def test_a_short_last_group_is_refused() -> None:
    with pytest.raises(ValueError, match="not a multiple of group size 3"):
        QuantizedMatrix(
            torch.zeros((2, 4), dtype=torch.uint8), torch.ones((2, 2)), torch.ones((2, 2), dtype=torch.uint8), 4, 3
        )
