from __future__ import annotations

from collections.abc import Generator

import pytest
import torch
from torch import Tensor

from quant.method.output_parts import FEWEST_OUTPUTS, settle_in_parts
from quant.method.refine import CodedColumns

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def two_threads() -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def settle(part: Tensor) -> CodedColumns:
    assert torch.get_num_threads() == 1
    columns = part.t()
    return CodedColumns(columns.abs().to(torch.uint8), columns[:2] * 3, columns[:2].round())


@pytest.mark.parametrize("outputs", [3, 2 * FEWEST_OUTPUTS, 2 * FEWEST_OUTPUTS + 5])
@pytest.mark.parametrize("is_inference", [True, False])
def test_parts_together_are_the_whole(outputs: int, is_inference: bool) -> None:
    with torch.inference_mode(is_inference):
        weight = torch.randn((outputs, 8), generator=torch.Generator().manual_seed(0)) * 50
        found = settle_in_parts(settle, weight)
        torch.set_num_threads(1)
        expected = settle(weight)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scales, expected.scales)
        assert torch.equal(found.zeros, expected.zeros)
        assert found.codes.is_inference() == is_inference


def test_threads_are_restored_after_a_failure() -> None:
    def fail(part: Tensor) -> CodedColumns:
        raise ValueError(str(part.shape))

    with pytest.raises(ValueError, match="256"):
        settle_in_parts(fail, torch.zeros((2 * FEWEST_OUTPUTS, 8)))
    assert torch.get_num_threads() == 2
