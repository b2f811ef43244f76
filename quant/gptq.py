"""GPTQ for one weight matrix: pure functions from (weight, Hessian of the inputs) to codes, scales and zero points.

Nothing here knows of models, files or devices. Source: arXiv:2210.17323, algorithm 1. We deviate in three places: grids
are chosen by a short search for the least weighted error, not by the extremes alone; scales are rounded to what the
checkpoint and the fast product can hold before errors are fed back, so the stored weight is the one compensated for;
and act-order can keep its groups in natural order ("static groups"), so that `g_idx` stays trivial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from quant.errors import QuantizationError
from quant.matrix import QuantizedMatrix
from quant.packing import PACKABLE_BITS

DEFAULT_GROUP_SIZES = (128, 64, 32)
# The group size that file formats and other tools write for one group over all inputs.
WHOLE_ROW = -1
# Cholesky of a Hessian from few or redundant samples fails; the damping then grows by this factor, up to the limit.
DAMP_GROWTH = 10.0
MAX_DAMP = 10.0
# Relative shrinkages of the widest grid that the range search tries. Below about 0.6 clipping always costs more.
RANGE_SHRINKAGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
MIN_SCALE = 2.0**-20
MAX_SCALE = 65504.0
HESSIAN_BLOCK = 192
LARGE_BLOCK = 128
SMALL_BLOCK = 32


class ActOrder(StrEnum):
    """In which order inputs are quantised, and with it which of them share a group.

    none:     as they come
    static:   those that matter most first; groups stay runs of neighbours, fixed beforehand
    shuffled: those that matter most first, and groups are runs of that order ("desc_act"; `g_idx` is not trivial)
    """

    NONE = "none"
    STATIC = "static"
    SHUFFLED = "shuffled"


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """`group_size` None means the largest of 128, 64, 32 that divides the inputs, -1 one group over all of them. `damp`
    is a share of the Hessian's mean diagonal. `range_search` chooses each grid by its error instead of by the extremes
    alone."""

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    act_order: ActOrder = ActOrder.NONE
    damp: float = 0.01
    range_search: bool = True

    def __post_init__(self) -> None:
        if self.bits not in PACKABLE_BITS:
            raise QuantizationError(f"bits is {self.bits}; 4 and 8 are supported")
        if self.group_size is not None and self.group_size < 1 and self.group_size != WHOLE_ROW:
            raise QuantizationError(f"group size is {self.group_size}; it must be positive, or -1 for all inputs")
        if not 0 < self.damp <= MAX_DAMP:
            raise QuantizationError(f"damp is {self.damp}; it must be above 0 and at most {MAX_DAMP:g}")


@dataclass(frozen=True, slots=True)
class GptqResult:
    """`error` is the squared error of the outputs over their squared norm, on the calibration inputs. `damp` is the
    damping that was needed."""

    matrix: QuantizedMatrix
    error: float
    damp: float


@dataclass(frozen=True, slots=True)
class Grid:
    """One scale and zero point per row, (out,) float32 each."""

    scale: Tensor
    zero: Tensor


class HessianSum:
    """X^T X of all inputs of a linear, streamed: products in the inputs' own type, the sum in float32."""

    def __init__(self, in_features: int) -> None:
        self._sum = torch.zeros((in_features, in_features), dtype=torch.float32)
        self.num_rows = 0

    def add(self, inputs: Tensor) -> None:
        """inputs: (..., in), float32 or bf16."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        self.num_rows += rows.shape[0]
        # Only the blocks on and below the diagonal: the rest is their mirror image.
        for start in range(0, rows.shape[1], HESSIAN_BLOCK):
            stop = start + HESSIAN_BLOCK
            self._sum[start:stop, :stop] += rows[:, start:stop].t() @ rows[:, :stop]

    def mean(self) -> Tensor:
        """(in, in) float32, symmetric."""
        lower = torch.tril(self._sum)
        return (lower + torch.tril(self._sum, -1).t()) / max(self.num_rows, 1)


def choose_group_size(in_sizes: Sequence[int], requested: int | None) -> int:
    """`requested` if it divides every input size (-1 always does), else QuantizationError with those that do; None takes
    the largest."""
    dividing = [size for size in DEFAULT_GROUP_SIZES if all(inputs % size == 0 for inputs in in_sizes)]
    if requested is not None:
        if requested == WHOLE_ROW or all(inputs % requested == 0 for inputs in in_sizes):
            return requested
        offered = ", ".join(str(size) for size in dividing) or "none of 128, 64, 32"
        raise QuantizationError(
            f"group size {requested} does not divide every layer's inputs {sorted(set(in_sizes))}; these do: {offered}"
        )
    if not dividing:
        raise QuantizationError(
            f"none of the group sizes 128, 64, 32 divides every layer's inputs {sorted(set(in_sizes))}; "
            "give one that does with --group-size"
        )
    return dividing[0]


def _inputs_of_group(in_features: int, options: GptqOptions) -> int:
    chosen = choose_group_size([in_features], options.group_size)
    return in_features if chosen == WHOLE_ROW else chosen


def quantize_matrix(weight: Tensor, hessian: Tensor, options: GptqOptions) -> GptqResult:
    """Quantise `weight` so that its outputs, not its values, change least.

    weight:  (out, in), any floating type
    hessian: (in, in), mean of x x^T over calibration inputs x; not changed
    Raises QuantizationError if the group size does not divide the inputs, a value is not finite, or no damping makes
    the Hessian positive definite.
    """
    in_features = weight.shape[1]
    group_size = _inputs_of_group(in_features, options)
    if tuple(hessian.shape) != (in_features, in_features):
        raise ValueError(f"the Hessian must be ({in_features}, {in_features}); found {tuple(hessian.shape)}")
    original = weight.detach().to(torch.float32)
    hessian = hessian.to(torch.float32)
    if not bool(torch.isfinite(original).all()) or not bool(torch.isfinite(hessian).all()):
        raise QuantizationError("the weight or its calibration inputs hold values that are not finite")
    importance = hessian.diagonal().clone()
    columns = original.t().contiguous()  # (in, out): one input's weights are contiguous
    columns[importance == 0] = 0.0  # never used: any value is right, and 0 costs no range
    natural = torch.arange(in_features)
    is_ordered = options.act_order is not ActOrder.NONE
    order = torch.argsort(importance, descending=True, stable=True) if is_ordered else natural
    inverse_root, damp = inverse_cholesky(hessian[order][:, order], options.damp)
    # Groups of neighbouring columns that are apart in time: their grids are fixed beforehand.
    is_static = options.act_order is ActOrder.STATIC
    grids = _fixed_grids(columns, importance, group_size, options) if is_static else None
    group_of_column = (order if is_static else natural) // group_size
    codes, scales, zeros = _quantize_columns(
        columns[order], importance[order], inverse_root, group_of_column.tolist(), grids, group_size, options
    )
    position = torch.argsort(order)
    group_of_input = group_of_column[position].to(torch.int32)
    matrix = QuantizedMatrix(
        codes=codes[position].t().contiguous(),
        scales=scales.t().contiguous(),
        zeros=zeros.t().to(torch.uint8).contiguous(),
        bits=options.bits,
        group_size=group_size,
        group_of_input=None if torch.equal(group_of_input, (natural // group_size).to(torch.int32)) else group_of_input,
    )
    return GptqResult(matrix=matrix, error=output_error(original, matrix, hessian), damp=damp)


def inverse_cholesky(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """The upper Cholesky factor of the damped Hessian's inverse, and the damping that was needed.

    Inputs that never occur (zero diagonal) count as 1. Raises QuantizationError when damping up to MAX_DAMP fails.
    """
    diagonal = hessian.diagonal()
    unused = torch.where(diagonal == 0, 1.0, 0.0)
    mean = float((diagonal + unused).mean())
    tried = damp
    while tried <= MAX_DAMP * 1.001:
        damped = hessian + torch.diag(unused + tried * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return upper, tried
        tried *= DAMP_GROWTH
    raise QuantizationError(
        f"the Hessian is not positive definite even with {MAX_DAMP:g} times its mean diagonal added; "
        "give more, or more varied, calibration text"
    )


def output_error(weight: Tensor, matrix: QuantizedMatrix, hessian: Tensor) -> float:
    """Squared error of the outputs over their squared norm. weight (out, in) float32, hessian (in, in) float32."""
    difference = weight - matrix.dequantize()
    wrong = float(((difference @ hessian) * difference).sum())
    whole = float(((weight @ hessian) * weight).sum())
    return wrong / whole if whole > 0 else 0.0


def round_to_nearest(weight: Tensor, options: GptqOptions, importance: Tensor | None = None) -> QuantizedMatrix:
    """The same grids without error feedback: what GPTQ is measured against. importance: (in,), 1 if absent."""
    group_size = _inputs_of_group(weight.shape[1], options)
    columns = weight.detach().to(torch.float32).t().contiguous()
    weights = torch.ones(weight.shape[1]) if importance is None else importance
    grids = _fixed_grids(columns, weights, group_size, options)
    codes = torch.cat(
        [
            nearest_codes(columns[start : start + group_size], grids[start // group_size], options.bits)
            for start in range(0, columns.shape[0], group_size)
        ]
    )
    return QuantizedMatrix(
        codes=codes.t().to(torch.uint8).contiguous(),
        scales=torch.stack([grid.scale for grid in grids], dim=1),
        zeros=torch.stack([grid.zero for grid in grids], dim=1).to(torch.uint8),
        bits=options.bits,
        group_size=group_size,
    )


def nearest_codes(columns: Tensor, grid: Grid, bits: int) -> Tensor:
    """columns (..., out) -> codes of the same shape, as float32 whole numbers."""
    return torch.round(columns / grid.scale).add_(grid.zero).clamp_(0, (1 << bits) - 1)


def find_grid(group: Tensor, importance: Tensor, options: GptqOptions) -> Grid:
    """The grid of one group. group: (columns, out) float32; importance: (columns,), weights of their errors."""
    candidates = _symmetric_grids(group, options) if options.symmetric else _asymmetric_grids(group, options)
    if len(candidates) == 1:
        return candidates[0]
    weights = importance.unsqueeze(1)
    scale, zero = candidates[0].scale.clone(), candidates[0].zero.clone()
    least = torch.full_like(scale, torch.inf)
    for grid in candidates:
        reached = (nearest_codes(group, grid, options.bits) - grid.zero).mul_(grid.scale)
        error = reached.sub_(group).square_().mul_(weights).sum(dim=0)
        better = error < least
        scale = torch.where(better, grid.scale, scale)
        zero = torch.where(better, grid.zero, zero)
        least = torch.minimum(error, least)
    return Grid(scale, zero)


def storable_scale(scale: Tensor, bits: int) -> Tensor:
    """Round to what fp16 (the checkpoint) holds and, at 4 bits, also bf16 (the fast product); zero becomes MIN_SCALE.

    At 8 bits bf16 would move the far end of the grid by half a step, and there is no fast product to gain. Raises
    QuantizationError for scales beyond fp16.
    """
    if float(scale.abs().max()) > MAX_SCALE:
        raise QuantizationError(f"a group needs a scale of {float(scale.abs().max()):g}; fp16 holds {MAX_SCALE:g}")
    magnitude = scale.abs().clamp_min(MIN_SCALE)
    signed = torch.where(scale < 0, -magnitude, magnitude)
    if bits == 4:
        signed = signed.to(torch.bfloat16)
    return signed.to(torch.float16).to(torch.float32)


def _symmetric_grids(group: Tensor, options: GptqOptions) -> list[Grid]:
    """Zero point in the middle. Codes reach one step further down than up, so the search also turns the sign over."""
    middle = 1 << (options.bits - 1)
    highest, lowest = group.amax(dim=0), group.amin(dim=0)
    zero = torch.full_like(highest, float(middle))
    if not options.range_search:
        return [Grid(storable_scale(torch.maximum(highest, -lowest) / (middle - 0.5), options.bits), zero)]
    # The end with the larger magnitude lies on code 0, at -middle steps: a negative scale puts positive weights there.
    farthest = torch.where(highest > -lowest, -highest, -lowest) / middle
    widest = torch.maximum(highest, -lowest) / (middle - 1)
    grids = [Grid(storable_scale(farthest * shrinkage, options.bits), zero) for shrinkage in RANGE_SHRINKAGES]
    grids.append(Grid(storable_scale(widest, options.bits), zero))
    return grids


def _asymmetric_grids(group: Tensor, options: GptqOptions) -> list[Grid]:
    """Zero point anywhere in 1..top: version 1 of the file format stores it minus one, so 0 has no place there."""
    top = (1 << options.bits) - 1
    highest, lowest = group.amax(dim=0).clamp_min(0), group.amin(dim=0).clamp_max(0)
    shrinkages = RANGE_SHRINKAGES if options.range_search else (1.0,)
    grids: list[Grid] = []
    for shrinkage in shrinkages:
        up, down = highest * shrinkage, -lowest * shrinkage
        steps = torch.clamp((up + down) / top, min=MIN_SCALE)
        zero = torch.round(down / steps).clamp_(1, top)
        # Shifting the grid may have taken a level from the positive side: the scale grows until the end rounds inside.
        scale = torch.maximum(steps, up / (top - zero + 0.5))
        grids.append(Grid(storable_scale(scale, options.bits), zero))
    return grids


def _fixed_grids(columns: Tensor, importance: Tensor, group_size: int, options: GptqOptions) -> list[Grid]:
    """Grids of all groups in natural order, from columns (in, out) as they are."""
    return [
        find_grid(columns[start : start + group_size], importance[start : start + group_size], options)
        for start in range(0, columns.shape[0], group_size)
    ]


def _quantize_columns(
    columns: Tensor,
    importance: Tensor,
    inverse_root: Tensor,
    group_of_column: Sequence[int],
    grids: list[Grid] | None,
    group_size: int,
    options: GptqOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise one column after another, each passing its error on to those still open.

    columns: (in, out) float32 in the order of quantisation, used up. inverse_root: (in, in) upper triangular, in the
    same order. grids: None to choose each group's grid when its first column comes, from the weights as they are then.
    Returns codes (in, out) uint8 in the same order, and scales and zeros, (groups, out) each, by group.
    """
    num_columns, num_rows = columns.shape
    codes = torch.empty((num_columns, num_rows), dtype=torch.uint8)
    errors = torch.empty((num_columns, num_rows))
    chosen: list[Grid] = [] if grids is None else grids
    top = (1 << options.bits) - 1
    # Errors travel at once within a small block, at its end within the large, at that one's end everywhere. Every
    # group begins on a border of both, so a grid chosen at a group's first column sees weights that are up to date.
    large = group_size * math.ceil(LARGE_BLOCK / group_size)
    small = math.gcd(group_size, SMALL_BLOCK)
    for start in range(0, num_columns, small):
        stop = start + small
        large_stop = min(start // large * large + large, num_columns)
        for column in range(start, stop):
            if grids is None and column % group_size == 0:
                ahead = slice(column, column + group_size)
                chosen.append(find_grid(columns[ahead], importance[ahead], options))
            grid = chosen[group_of_column[column]]
            current, error = columns[column], errors[column]
            code = torch.div(current, grid.scale).round_().add_(grid.zero).clamp_(0, top)
            codes[column] = code
            torch.sub(current, code.sub_(grid.zero).mul_(grid.scale), out=error)
            error /= inverse_root[column, column]
            columns[column + 1 : stop].addr_(inverse_root[column, column + 1 : stop], error, alpha=-1.0)
        _pass_on(errors, inverse_root, columns, slice(start, stop), slice(stop, large_stop))
        if stop == large_stop:
            _pass_on(errors, inverse_root, columns, slice(start // large * large, stop), slice(stop, num_columns))
    scales = torch.stack([grid.scale for grid in chosen])
    zeros = torch.stack([grid.zero for grid in chosen])
    return codes, scales, zeros


def _pass_on(errors: Tensor, inverse_root: Tensor, columns: Tensor, done: slice, still_open: slice) -> None:
    if still_open.start < still_open.stop:
        columns[still_open].addmm_(inverse_root[done, still_open].t(), errors[done], alpha=-1.0)
