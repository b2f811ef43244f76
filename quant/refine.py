"""Coordinate descent on one quantised matrix: after GPTQ, which never looks back, each code and scale is settled again.

Pure functions. The objective is GPTQ's own, the squared error of the outputs; rows do not influence each other. Each
step moves one input's codes, or one group's scales, to their best values with all others as they are, so the error
never rises. A sweep costs about as much as GPTQ itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.scales import storable_scale


@dataclass(frozen=True, slots=True)
class CodedColumns:
    """A quantised matrix with its inputs along the first axis, each group one run of neighbours.

    codes:  (in, out) uint8
    scales: (groups, out) float32
    zeros:  (groups, out) float32, whole numbers
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    @property
    def group_size(self) -> int:
        return self.codes.shape[0] // self.scales.shape[0]


def refine(columns: Tensor, hessian: Tensor, coded: CodedColumns, bits: int, sweeps: int) -> CodedColumns:
    """`coded` after `sweeps` rounds of descent on the error of its outputs.

    columns: (in, out) float32, the weight to reach
    hessian: (in, in) float32, undamped, inputs in the order of `columns`
    """
    size = coded.group_size
    scales = coded.scales.clone()
    steps = coded.codes.to(torch.float32)  # (in, out), codes less their zero points
    steps.unflatten(0, (-1, size)).sub_(coded.zeros.unsqueeze(1))
    reached = steps.unflatten(0, (-1, size)).mul(scales.unsqueeze(1)).flatten(0, 1)
    slope = hessian @ (columns - reached)  # (in, out), minus half the error's gradient
    # An input that never occurs has no curvature, and its slope is 0: it stays where it is.
    curvature = torch.where(hessian.diagonal() > 0, hessian.diagonal(), 1.0).tolist()
    for _ in range(sweeps):
        for group in range(scales.shape[0]):
            inside = slice(group * size, group * size + size)
            before = reached[inside].clone()
            own_slope, own_hessian = slope[inside].clone(), hessian[inside, inside].contiguous()
            _refit_scale(scales[group], steps[inside], reached[inside], own_slope, own_hessian, bits)
            lowest = -coded.zeros[group]
            _descend(
                steps[inside],
                reached[inside],
                own_slope,
                own_hessian,
                curvature[inside],
                scales[group],
                (lowest, lowest + ((1 << bits) - 1)),
            )
            slope.addmm_(hessian[:, inside], reached[inside] - before, alpha=-1.0)
    codes = steps.unflatten(0, (-1, size)).add_(coded.zeros.unsqueeze(1)).flatten(0, 1)
    return CodedColumns(codes.to(torch.uint8), scales, coded.zeros)


def _refit_scale(scale: Tensor, steps: Tensor, reached: Tensor, slope: Tensor, hessian: Tensor, bits: int) -> None:
    """Move one group's scales (out,) to the least-squares fit of its codes, where that can be stored and pays.

    steps, reached, slope: (group, out), of this group; hessian: (group, group). All but the last are changed in place.
    """
    gain = (steps * slope).sum(dim=0)
    curvature = (steps * (hessian @ steps)).sum(dim=0).clamp_min_(torch.finfo(torch.float32).tiny)
    # A fit of the other sign, or beyond all bounds, comes of a group whose codes say almost nothing: it is not moved.
    fitted = scale + gain / curvature
    fitted = torch.where((fitted * scale > 0) & (fitted.abs() < 2 * scale.abs()), fitted, scale)
    change = storable_scale(fitted, bits) - scale
    change *= (change * (change * curvature - 2 * gain) < 0).to(change.dtype)
    scale += change
    moved = steps * change
    reached += moved
    slope.addmm_(hessian, moved, alpha=-1.0)


def _descend(
    steps: Tensor,
    reached: Tensor,
    slope: Tensor,
    hessian: Tensor,
    curvature: list[float],
    scale: Tensor,
    limits: tuple[Tensor, Tensor],
) -> None:
    """Settle a group's codes one input after another. Shapes as in `_refit_scale`; limits: lowest and highest step."""
    per_step = 1.0 / scale
    for column in range(steps.shape[0]):
        best = torch.add(reached[column], slope[column], alpha=1.0 / curvature[column])
        torch.clamp(best.mul_(per_step).round_(), *limits, out=steps[column])
        now = steps[column] * scale
        slope.addr_(hessian[column], now - reached[column], alpha=-1.0)
        reached[column] = now
