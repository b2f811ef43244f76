"""GPTQ for one weight matrix: pure functions from (weight, Hessian of the inputs) to codes, scales and zero points.

Nothing here knows of models, files or devices. Source: arXiv:2210.17323, algorithm 1. We deviate in four places: grids
are chosen by a short search for the least error as GPTQ will count it, not by the extremes alone; scales are rounded to
what the checkpoint and the fast product can hold before errors are fed back, so the stored weight is the one
compensated for; static act-order takes whole groups of neighbours by importance, so that `g_idx` stays trivial and each
grid is still chosen when its turn comes; and at the end codes and scales are refined (`quant.refine`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from quant.errors import QuantizationError
from quant.matrix import QuantizedMatrix, split_rows
from quant.output_parts import settle_in_parts
from quant.packing import PACKABLE_BITS
from quant.refine import CodedColumns, refine
from quant.scales import MIN_SCALE, storable_scale

DEFAULT_GROUP_SIZES = (128, 64, 32)
# The group size that file formats and other tools write for one group over all inputs.
WHOLE_ROW = -1
# Cholesky of a Hessian from few or redundant samples fails; the damping then grows by this factor, up to the limit.
DAMP_GROWTH = 10.0
MAX_DAMP = 10.0
# Relative shrinkages of the widest grid that the range search tries. Below about 0.6 clipping always costs more.
RANGE_SHRINKAGES = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.79, 0.75, 0.71, 0.67, 0.63)
# After so many rounds of descent little is left to gain: 4 take a tenth off GPTQ's error, 8 a hundredth more.
REFINE_SWEEPS = 4
HESSIAN_BLOCK = 192
# Outputs whose error is computed at a time.
ERROR_ROWS = 1024
LARGE_BLOCK = 128
SMALL_BLOCK = 32


class ActOrder(StrEnum):
    """In which order inputs are quantised, and with it which of them share a group.

    none:     as they come
    static:   groups that matter most first, and so within each; groups stay runs of neighbours, in the file as well
    shuffled: those that matter most first, and groups are runs of that order ("desc_act"; `g_idx` is not trivial)
    """

    NONE = "none"
    STATIC = "static"
    SHUFFLED = "shuffled"


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """`group_size` None means the largest of 128, 64, 32 that divides the inputs, -1 one group over all of them. `damp`
    is a share of the Hessian's mean diagonal. `range_search` chooses each grid by its error instead of by the extremes
    alone. `refine_sweeps` is the number of rounds of `quant.refine`; 0 leaves GPTQ's own result."""

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    act_order: ActOrder = ActOrder.NONE
    damp: float = 0.01
    range_search: bool = True
    refine_sweeps: int = REFINE_SWEEPS

    def __post_init__(self) -> None:
        if self.bits not in PACKABLE_BITS:
            raise QuantizationError(f"bits is {self.bits}; 4 and 8 are supported")
        if self.group_size is not None and self.group_size < 1 and self.group_size != WHOLE_ROW:
            raise QuantizationError(f"group size is {self.group_size}; it must be positive, or -1 for all inputs")
        if not 0 < self.damp <= MAX_DAMP:
            raise QuantizationError(f"damp is {self.damp}; it must be above 0 and at most {MAX_DAMP:g}")
        if self.refine_sweeps < 0:
            raise QuantizationError(f"refine_sweeps is {self.refine_sweeps}; it must be 0 or more")


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
        # Mirrored block by block: of the largest layers, one more such matrix is most of the memory.
        mean = self._sum / max(self.num_rows, 1)
        for start in range(0, mean.shape[0], HESSIAN_BLOCK):
            stop = start + HESSIAN_BLOCK
            corner = torch.tril(mean[start:stop, start:stop])
            mean[start:stop, start:stop] = corner + torch.tril(corner, -1).t()
            mean[start:stop, stop:] = mean[stop:, start:stop].t()
        return mean


def choose_group_size(in_sizes: Sequence[int], requested: int | None) -> int:
    """`requested` if it divides every input size (-1 always does), else QuantizationError with those that do.

    None takes the largest default that divides them all.
    """
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
    order = _order_of_inputs(importance, group_size, options.act_order)
    ordered = hessian
    if options.act_order is not ActOrder.NONE:
        ordered, columns = hessian[order][:, order], columns[order]
    inverse_root, damp = inverse_cholesky(ordered, options.damp)

    def settle(part: Tensor) -> CodedColumns:
        coded = _quantize_columns(part.clone(), inverse_root, group_size, options)
        return refine(part, ordered, coded, options.bits, options.refine_sweeps) if options.refine_sweeps else coded

    matrix = _in_natural_order(settle_in_parts(settle, columns), order, options)
    return GptqResult(matrix=matrix, error=output_error(original, matrix, hessian), damp=damp)


def _order_of_inputs(importance: Tensor, group_size: int, act_order: ActOrder) -> Tensor:
    """(in,) int64: which input comes when; every `group_size` of them form a group. importance: (in,)."""
    if act_order is ActOrder.SHUFFLED:
        return torch.argsort(importance, descending=True, stable=True)
    natural = torch.arange(importance.shape[0])
    if act_order is ActOrder.NONE:
        return natural
    grouped = importance.unflatten(0, (-1, group_size))
    within = torch.argsort(grouped, dim=1, descending=True, stable=True)
    inputs = natural.unflatten(0, (-1, group_size)).gather(1, within)
    return inputs[torch.argsort(grouped.sum(dim=1), descending=True, stable=True)].flatten()


def _in_natural_order(coded: CodedColumns, order: Tensor, options: GptqOptions) -> QuantizedMatrix:
    """Undo `order`: inputs, and groups unless they are not runs of neighbours."""
    size, num_inputs = coded.group_size, order.shape[0]
    position = torch.argsort(order)
    scales, zeros = coded.scales, coded.zeros
    group_of_input: Tensor | None = None
    if options.act_order is ActOrder.SHUFFLED and size < num_inputs:
        group_of_input = (position // size).to(torch.int32)
    else:
        turn_of_group = torch.argsort(order[::size] // size)
        scales, zeros = scales[turn_of_group], zeros[turn_of_group]
    return QuantizedMatrix(
        codes=coded.codes[position].t().contiguous(),
        scales=scales.t().contiguous(),
        zeros=zeros.t().to(torch.uint8).contiguous(),
        bits=options.bits,
        group_size=size,
        group_of_input=group_of_input,
    )


def inverse_cholesky(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """The upper Cholesky factor of the damped Hessian's inverse, and the damping that was needed.

    Inputs that never occur (zero diagonal) count as 1. Raises QuantizationError when damping up to MAX_DAMP fails.
    """
    diagonal = hessian.diagonal()
    unused = torch.where(diagonal == 0, 1.0, 0.0)
    mean = float((diagonal + unused).mean())
    tried = damp
    while tried <= MAX_DAMP * 1.001:
        upper = _root_of_inverse(hessian, unused + tried * mean)
        if upper is not None:
            return upper, tried
        tried *= DAMP_GROWTH
    raise QuantizationError(
        f"the Hessian is not positive definite even with {MAX_DAMP:g} times its mean diagonal added; "
        "give more, or more varied, calibration text"
    )


def _root_of_inverse(hessian: Tensor, added: Tensor) -> Tensor | None:
    """The upper factor of the inverse of `hessian` with `added` on its diagonal, None if that is not positive definite.

    At most two more such matrices are in memory at any time.
    """
    work = hessian.clone()
    work.diagonal().add_(added)
    work, failed = torch.linalg.cholesky_ex(work)
    if int(failed):
        return None
    work = torch.cholesky_inverse(work)
    work, failed = torch.linalg.cholesky_ex(work, upper=True)
    # The sum is finite only where everything is, and takes no memory.
    return None if int(failed) or not math.isfinite(float(work.sum())) else work


def output_error(weight: Tensor, matrix: QuantizedMatrix, hessian: Tensor) -> float:
    """Squared error of the outputs over their squared norm. weight (out, in) float32, hessian (in, in) float32."""
    wrong = whole = 0.0
    runs = zip(weight.split(ERROR_ROWS), split_rows(matrix, _run_lengths(weight.shape[0])), strict=True)
    for rows, run in runs:
        difference = rows - run.dequantize()
        wrong += float((difference @ hessian).mul_(difference).sum())
        whole += float((rows @ hessian).mul_(rows).sum())
    return wrong / whole if whole > 0 else 0.0


def _run_lengths(rows: int) -> list[int]:
    return [min(ERROR_ROWS, rows - start) for start in range(0, rows, ERROR_ROWS)]


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


def _quantize_columns(columns: Tensor, inverse_root: Tensor, group_size: int, options: GptqOptions) -> CodedColumns:
    """Quantise one column after another, each passing its error on to those still open.

    columns: (in, out) float32 in the order of quantisation, used up. inverse_root: (in, in) upper triangular, in the
    same order. Each group's grid is chosen when its first column comes, from the weights as they are then.
    """
    num_columns, num_rows = columns.shape
    codes = torch.empty((num_columns, num_rows), dtype=torch.uint8)
    errors = torch.empty((num_columns, num_rows))
    # What is left of a column's error once those still open have made up for it.
    importance = inverse_root.diagonal().pow(-2)
    grids: list[Grid] = []
    top = (1 << options.bits) - 1
    # Errors travel at once within a small block, at its end within the large, at that one's end everywhere. Every
    # group begins on a border of both, so a grid chosen at a group's first column sees weights that are up to date.
    large = group_size * math.ceil(LARGE_BLOCK / group_size)
    small = math.gcd(group_size, SMALL_BLOCK)
    for start in range(0, num_columns, small):
        stop = start + small
        large_stop = min(start // large * large + large, num_columns)
        for column in range(start, stop):
            if column % group_size == 0:
                ahead = slice(column, column + group_size)
                grids.append(find_grid(columns[ahead], importance[ahead], options))
            grid = grids[-1]
            current, error = columns[column], errors[column]
            code = torch.div(current, grid.scale).round_().add_(grid.zero).clamp_(0, top)
            codes[column] = code
            torch.sub(current, code.sub_(grid.zero).mul_(grid.scale), out=error)
            error /= inverse_root[column, column]
            columns[column + 1 : stop].addr_(inverse_root[column, column + 1 : stop], error, alpha=-1.0)
        _pass_on(errors, inverse_root, columns, slice(start, stop), slice(stop, large_stop))
        if stop == large_stop:
            _pass_on(errors, inverse_root, columns, slice(start // large * large, stop), slice(stop, num_columns))
    return CodedColumns(codes, torch.stack([grid.scale for grid in grids]), torch.stack([grid.zero for grid in grids]))


def _pass_on(errors: Tensor, inverse_root: Tensor, columns: Tensor, done: slice, still_open: slice) -> None:
    if still_open.start < still_open.stop:
        columns[still_open].addmm_(inverse_root[done, still_open].t(), errors[done], alpha=-1.0)
