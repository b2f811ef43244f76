"""The steps that settle one group of inputs, in GPTQ and in the refinement after it, for all outputs at once.

`PlainSettling` is the twin: torch, one input after another. `quant.native.settling` computes the same in C, where a
step costs no more than its arithmetic; `fastest_settling` chooses. Called by `quant.method.{gptq,refine}`.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from quant.method.grids import Grid, GridKind, find_grid
from quant.method.scales import storable_scale
from quant.native.library import load_library
from quant.native.settling import NativeSettling


class Settling(Protocol):
    """All tensors float32 and contiguous along outputs, unless said otherwise."""

    @property
    def name(self) -> str:
        """Part of what decides the codes: sums in another order can tip a weight that lies between two of them."""
        ...

    def find_grid(self, group: Tensor, importance: Tensor, kind: GridKind) -> Grid:
        """The grid of least error. group: (inputs, out); importance: (inputs,), weights of their errors."""
        ...

    def feed_back(self, columns: Tensor, lower: Tensor, grid: Grid, bits: int, codes: Tensor, errors: Tensor) -> None:
        """Quantise one input after another, each passing its error on to those that follow in the block.

        columns: (inputs, out); may be used up
        lower:   (inputs, inputs), the diagonal and what lies below is read: transposed root of the Hessian's inverse
        codes:   (inputs, out) uint8, written
        errors:  (inputs, out), written: what is left of each input, in units of its diagonal element
        """
        ...

    def refine_group(
        self, codes: Tensor, scale: Tensor, zero: Tensor, slope: Tensor, hessian: Tensor, bits: int
    ) -> Tensor:
        """Move a group's scales, then its codes one input after another, to where the outputs' error is least.

        codes:   (inputs, out) uint8, changed
        scale:   (out,), changed; zero: (out,)
        slope:   (inputs, out), minus half the error's gradient; not changed
        hessian: (inputs, inputs)
        Returns by how much each weight changed, (inputs, out).
        """
        ...


@cache
def fastest_settling() -> Settling:
    """In C where this machine can, else in torch."""
    library = load_library()
    return PlainSettling() if library is None else NativeSettling(library)


class PlainSettling:
    name = "plain"

    def find_grid(self, group: Tensor, importance: Tensor, kind: GridKind) -> Grid:
        return find_grid(group, importance, kind)

    def feed_back(self, columns: Tensor, lower: Tensor, grid: Grid, bits: int, codes: Tensor, errors: Tensor) -> None:
        top = (1 << bits) - 1
        for column in range(columns.shape[0]):
            current, error = columns[column], errors[column]
            code = torch.div(current, grid.scale).round_().add_(grid.zero).clamp_(0, top)
            codes[column] = code
            torch.sub(current, code.sub_(grid.zero).mul_(grid.scale), out=error)
            error /= lower[column, column]
            columns[column + 1 :].addr_(lower[column + 1 :, column], error, alpha=-1.0)

    def refine_group(
        self, codes: Tensor, scale: Tensor, zero: Tensor, slope: Tensor, hessian: Tensor, bits: int
    ) -> Tensor:
        steps = codes - zero
        before = steps * scale
        reached, slope, hessian = before.clone(), slope.clone(), hessian.contiguous()
        _refit_scale(scale, steps, reached, slope, hessian, bits)
        _descend(steps, reached, slope, hessian, scale, (-zero, ((1 << bits) - 1) - zero))
        codes.copy_(steps.add_(zero))
        return reached.sub_(before)


def _refit_scale(scale: Tensor, steps: Tensor, reached: Tensor, slope: Tensor, hessian: Tensor, bits: int) -> None:
    """Move one group's scales (out,) to the least-squares fit of its codes, where that can be stored and pays.

    steps, reached, slope: (inputs, out), of this group; hessian: (inputs, inputs). All but the last and `steps` are
    changed in place.
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
    steps: Tensor, reached: Tensor, slope: Tensor, hessian: Tensor, scale: Tensor, limits: tuple[Tensor, Tensor]
) -> None:
    """Settle a group's codes one input after another. Shapes as in `_refit_scale`; limits: lowest and highest step."""
    per_step = 1.0 / scale
    # An input that never occurs has no curvature, and its slope is 0: it stays where it is.
    curvature: list[float] = torch.where(hessian.diagonal() > 0, hessian.diagonal(), 1.0).tolist()
    for column in range(steps.shape[0]):
        best = torch.add(reached[column], slope[column], alpha=1.0 / curvature[column])
        torch.clamp(best.mul_(per_step).round_(), *limits, out=steps[column])
        now = steps[column] * scale
        slope.addr_(hessian[column], now - reached[column], alpha=-1.0)
        reached[column] = now
