"""Grids of evenly spaced values that a group of weights is rounded to, and the short search for the best of them.

Pure functions; `quant.native.settling` computes the same faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.method.scales import MIN_SCALE, storable_scale

# Relative shrinkages of the widest grid that the range search tries. Below about 0.6 clipping always costs more.
RANGE_SHRINKAGES = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.79, 0.75, 0.71, 0.67, 0.63)


@dataclass(frozen=True, slots=True)
class GridKind:
    """Which grids there are to choose from: fields as in `quant.method.gptq.GptqOptions`."""

    bits: int
    symmetric: bool
    range_search: bool


@dataclass(frozen=True, slots=True)
class Grid:
    """One scale and zero point per row, (out,) float32 each."""

    scale: Tensor
    zero: Tensor


def nearest_codes(columns: Tensor, grid: Grid, bits: int) -> Tensor:
    """columns (..., out) -> codes of the same shape, as float32 whole numbers."""
    return torch.round(columns / grid.scale).add_(grid.zero).clamp_(0, (1 << bits) - 1)


def find_grid(group: Tensor, importance: Tensor, kind: GridKind) -> Grid:
    """The grid of one group. group: (columns, out) float32; importance: (columns,), weights of their errors."""
    candidates = _symmetric_grids(group, kind) if kind.symmetric else _asymmetric_grids(group, kind)
    if len(candidates) == 1:
        return candidates[0]
    weights = importance.unsqueeze(1)
    scale, zero = candidates[0].scale.clone(), candidates[0].zero.clone()
    least = torch.full_like(scale, torch.inf)
    for grid in candidates:
        reached = (nearest_codes(group, grid, kind.bits) - grid.zero).mul_(grid.scale)
        error = reached.sub_(group).square_().mul_(weights).sum(dim=0)
        better = error < least
        scale = torch.where(better, grid.scale, scale)
        zero = torch.where(better, grid.zero, zero)
        least = torch.minimum(error, least)
    return Grid(scale, zero)


def _symmetric_grids(group: Tensor, kind: GridKind) -> list[Grid]:
    """Zero point in the middle. Codes reach one step further down than up, so the search also turns the sign over."""
    middle = 1 << (kind.bits - 1)
    highest, lowest = group.amax(dim=0), group.amin(dim=0)
    zero = torch.full_like(highest, float(middle))
    if not kind.range_search:
        return [Grid(storable_scale(torch.maximum(highest, -lowest) / (middle - 0.5), kind.bits), zero)]
    # The end with the larger magnitude lies on code 0, at -middle steps: a negative scale puts positive weights there.
    farthest = torch.where(highest > -lowest, -highest, -lowest) / middle
    widest = torch.maximum(highest, -lowest) / (middle - 1)
    grids = [Grid(storable_scale(farthest * shrinkage, kind.bits), zero) for shrinkage in RANGE_SHRINKAGES]
    grids.append(Grid(storable_scale(widest, kind.bits), zero))
    return grids


def _asymmetric_grids(group: Tensor, kind: GridKind) -> list[Grid]:
    """Zero point anywhere in 1..top: version 1 of the file format stores it minus one, so 0 has no place there."""
    top = (1 << kind.bits) - 1
    highest, lowest = group.amax(dim=0).clamp_min(0), group.amin(dim=0).clamp_max(0)
    shrinkages = RANGE_SHRINKAGES if kind.range_search else (1.0,)
    grids: list[Grid] = []
    for shrinkage in shrinkages:
        up, down = highest * shrinkage, -lowest * shrinkage
        steps = torch.clamp((up + down) / top, min=MIN_SCALE)
        zero = torch.round(down / steps).clamp_(1, top)
        # Shifting the grid may have taken a level from the positive side: the scale grows until the end rounds inside.
        scale = torch.maximum(steps, up / (top - zero + 0.5))
        grids.append(Grid(storable_scale(scale, kind.bits), zero))
    return grids
