from __future__ import annotations

import pytest
import torch

from quant.method.packing import pack_columns, pack_rows, unpack_columns, unpack_rows

pytestmark = pytest.mark.unit


def test_four_bit_codes_fill_a_word_from_its_lowest_bits() -> None:
    codes = torch.tensor([[1], [2], [3], [4], [5], [6], [7], [8]])
    assert pack_rows(codes, 4).tolist() == [[0x87654321 - 2**32]]


def test_eight_bit_codes_fill_a_word_from_its_lowest_bits() -> None:
    assert pack_columns(torch.tensor([[0x11, 0x22, 0x33, 0x44]]), 8).tolist() == [[0x44332211]]


def test_all_ones_word_is_minus_one_and_comes_back() -> None:
    words = pack_rows(torch.full((8, 1), 15), 4)
    assert words.tolist() == [[-1]]
    assert unpack_rows(words, 4).flatten().tolist() == [15] * 8


@pytest.mark.parametrize("bits", [4, 8])
def test_unpacking_undoes_packing(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (64, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits), codes)
    assert torch.equal(unpack_columns(pack_columns(codes, bits), bits), codes)


@pytest.mark.parametrize("code", [-1, 16])
def test_a_code_that_would_spill_into_its_neighbours_is_refused(code: int) -> None:
    codes = torch.zeros((8, 1), dtype=torch.int64)
    codes[2] = code
    with pytest.raises(ValueError, match=r"must lie in 0\.\.15"):
        pack_rows(codes, 4)


def test_codes_that_leave_a_word_half_full_are_refused() -> None:
    with pytest.raises(ValueError, match="whole words of 8"):
        pack_rows(torch.zeros((12, 1), dtype=torch.int64), 4)
