"""The steps within a group: C against torch, on whole tiles of outputs and on what is left over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.errors import QuantizationError
from quant.method.gptq import inverse_cholesky
from quant.method.grids import Grid, GridKind
from quant.method.settling import PlainSettling, Settling, fastest_settling
from quant.native.library import load_library

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(load_library() is None, reason="no native kernels on this machine"),
]

KINDS = [
    GridKind(bits, symmetric, search) for bits in (4, 8) for symmetric in (True, False) for search in (True, False)
]
OUTPUTS = [5, 64, 150]


def weights(outputs: int, size: int = 32) -> Tensor:
    """(size, outputs), each output of another size, some of one sign."""
    generator = torch.Generator().manual_seed(outputs)
    columns = torch.randn((size, outputs), generator=generator) * torch.logspace(-4, 1, outputs)
    columns[:, ::3] = columns[:, ::3].abs()
    columns[:, 1] = 0.0
    return columns


def hessian(size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn((size, size), generator=generator) * torch.rand(size, generator=generator) ** 2
    return mixing.t() @ mixing + 0.01 * torch.eye(size)


def squared_error(columns: Tensor, grid: Grid, importance: Tensor, bits: int) -> Tensor:
    codes = torch.round(columns / grid.scale).add(grid.zero).clamp(0, (1 << bits) - 1)
    return (((codes - grid.zero) * grid.scale - columns).square() * importance.unsqueeze(1)).sum(dim=0)


@pytest.mark.parametrize("kind", KINDS, ids=repr)
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_grids_are_as_good_as_the_twins(kind: GridKind, outputs: int) -> None:
    columns, importance = weights(outputs), torch.linspace(0.1, 3, 32)
    found = fastest_settling().find_grid(columns, importance, kind)
    expected = PlainSettling().find_grid(columns, importance, kind)
    # Sums in another order can choose the other of two grids that are as good.
    assert float((found.scale != expected.scale).float().mean()) <= 0.02
    error = squared_error(columns, found, importance, kind.bits)
    assert torch.allclose(error, squared_error(columns, expected, importance, kind.bits), rtol=1e-4, atol=1e-12)


def test_grids_beyond_fp16_are_refused() -> None:
    with pytest.raises(QuantizationError, match="65504"):
        fastest_settling().find_grid(torch.full((32, 7), 1e7), torch.ones(32), KINDS[0])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_errors_are_fed_back_as_the_twin_does(bits: int, outputs: int) -> None:
    kind = GridKind(bits, symmetric=False, range_search=True)
    grid = PlainSettling().find_grid(weights(outputs), torch.ones(32), kind)
    lower = inverse_cholesky(hessian(), 0.01)[0].t()

    def run(settling: Settling) -> tuple[Tensor, Tensor]:
        codes, errors = torch.empty((32, outputs), dtype=torch.uint8), torch.empty((32, outputs))
        settling.feed_back(weights(outputs), lower, grid, bits, codes, errors)
        return codes, errors

    found, expected = run(fastest_settling()), run(PlainSettling())
    # A weight that lies between two codes may fall on either, and then those after it in its output differ too.
    same = (found[0] == expected[0]).all(dim=0)
    assert float(same.float().mean()) >= 0.9
    assert torch.allclose(found[1][:, same], expected[1][:, same], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("size", [32, 20, 128])
def test_a_group_is_refined_as_the_twin_does(bits: int, outputs: int, size: int) -> None:
    wide = torch.zeros((size, size + 3))
    wide[:, :size] = hessian(size)
    inside, columns = wide[:, :size], weights(outputs, size)  # rows that do not follow each other
    grid = PlainSettling().find_grid(columns, torch.ones(size), GridKind(bits, symmetric=False, range_search=True))
    start = torch.round(columns / grid.scale).add(grid.zero).clamp(0, (1 << bits) - 1).to(torch.uint8)
    slope = inside @ (columns - (start - grid.zero) * grid.scale)

    def run(settling: Settling) -> tuple[Tensor, Tensor, Tensor]:
        codes, scale = start.clone(), grid.scale.clone()
        moved = settling.refine_group(codes, scale, grid.zero, slope, inside, bits)
        return codes, scale, moved

    found, expected = run(fastest_settling()), run(PlainSettling())
    same = (found[0] == expected[0]).all(dim=0) & (found[1] == expected[1])
    assert float(same.float().mean()) >= 0.85
    assert not torch.equal(found[0], start)
    assert torch.allclose(found[2][:, same], expected[2][:, same], rtol=1e-4, atol=1e-7)
    before, after = ((codes - grid.zero) * scale for codes, scale in ((start, grid.scale), found[:2]))
    assert torch.allclose(found[2], after - before, rtol=1e-4, atol=1e-7)


def test_an_output_does_not_depend_on_those_beside_it() -> None:
    columns, kind = weights(150), KINDS[0]
    whole = fastest_settling().find_grid(columns, torch.ones(32), kind)
    part = fastest_settling().find_grid(columns[:, 40:107].contiguous(), torch.ones(32), kind)
    assert torch.equal(whole.scale[40:107], part.scale)
