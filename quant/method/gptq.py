"""GPTQ for one weight matrix: pure functions from (weight, Hessian of the inputs) to codes, scales and zero points.

Nothing here knows of models, files or devices. Source: arXiv:2210.17323, algorithm 1. We deviate in four places: grids
are chosen by a short search for the least error as GPTQ will count it, not by the extremes alone; scales are rounded to
what the checkpoint and the fast product can hold before errors are fed back, so the stored weight is the one
compensated for; static act-order takes whole groups of neighbours by importance, so that `g_idx` stays trivial and each
grid is still chosen when its turn comes; and at the end codes and scales are refined (`quant.method.refine`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from quant.errors import QuantizationError
from quant.method.grids import Grid, GridKind, nearest_codes
from quant.method.matrix import QuantizedMatrix, split_rows
from quant.method.output_parts import settle_in_parts
from quant.method.packing import PACKABLE_BITS
from quant.method.refine import CodedColumns, refine
from quant.method.settling import Settling, fastest_settling

DEFAULT_GROUP_SIZES = (128, 64, 32)
# The group size that file formats and other tools write for one group over all inputs.
WHOLE_ROW = -1
# Cholesky of a Hessian from few or redundant samples fails; the damping then grows by this factor, up to the limit.
DAMP_GROWTH = 10.0
MAX_DAMP = 10.0
# After so many rounds of descent little is left to gain: 4 take a tenth off GPTQ's error, 8 a hundredth more.
REFINE_SWEEPS = 4
HESSIAN_BLOCK = 192
# Outputs whose error is computed at a time.
ERROR_ROWS = 1024
# Of a Hessian, whose inputs are put in order so many at a time.
PERMUTED_LINES = 256
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
    alone. `refine_sweeps` is the number of rounds of `quant.method.refine`; 0 leaves GPTQ's own result."""

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

    @property
    def grid(self) -> GridKind:
        return GridKind(self.bits, self.symmetric, self.range_search)


@dataclass(frozen=True, slots=True)
class GptqResult:
    """`damp` is the damping that was needed. errors: of each output on the calibration inputs, see `output_errors`."""

    matrix: QuantizedMatrix
    errors: Tensor
    damp: float

    @property
    def error(self) -> float:
        """Squared error of the outputs over their squared norm, on the calibration inputs."""
        return relative_error(self.errors)


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
        """(in, in) float32, symmetric. The sum is used up."""
        # In place and mirrored block by block: of the largest layers, one more such matrix is most of the memory.
        mean = self._sum.div_(max(self.num_rows, 1))
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


def quantize_matrix(
    weight: Tensor, hessian: Tensor, options: GptqOptions, settling: Settling | None = None
) -> GptqResult:
    """Quantise `weight` so that its outputs, not its values, change least.

    weight:   (out, in), any floating type
    hessian:  (in, in) float32, mean of x x^T over calibration inputs x; its inputs change places meanwhile, and are
              back in theirs at the end
    settling: the fastest on this machine if absent
    Raises QuantizationError if the group size does not divide the inputs, a value is not finite, or no damping makes
    the Hessian positive definite.
    """
    in_features = weight.shape[1]
    group_size = _inputs_of_group(in_features, options)
    if tuple(hessian.shape) != (in_features, in_features):
        raise ValueError(f"the Hessian must be ({in_features}, {in_features}); found {tuple(hessian.shape)}")
    weight = weight.detach()
    hessian = hessian.to(torch.float32).contiguous()
    if not is_finite(weight) or not is_finite(hessian):
        raise QuantizationError("the weight or its calibration inputs hold values that are not finite")
    order = _order_of_inputs(hessian.diagonal(), group_size, options.act_order)
    with _inputs_in_order(hessian, order):
        coded, damp = _settle(weight, hessian, order, group_size, options, settling or fastest_settling())
    matrix = _in_natural_order(coded, order, options)
    return GptqResult(matrix=matrix, errors=output_errors(weight, matrix, hessian), damp=damp)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; takes no memory of the tensor's size."""
    return all(math.isfinite(float(end)) for end in torch.aminmax(tensor))


@contextlib.contextmanager
def _inputs_in_order(hessian: Tensor, order: Tensor) -> Generator[None]:
    """Rows and columns of the Hessian are in `order` within the block, and back where they were after it."""
    is_trivial = bool((order == torch.arange(order.shape[0])).all())
    if not is_trivial:
        _permute(hessian, order)
    try:
        yield
    finally:
        if not is_trivial:
            _permute(hessian, torch.argsort(order))


def _permute(square: Tensor, order: Tensor) -> None:
    """square[order][:, order], in place: a second matrix of this size would be most of the memory there is."""
    for run in square.split(PERMUTED_LINES, dim=1):
        run.copy_(run[order])
    for run in square.split(PERMUTED_LINES):
        run.copy_(run[:, order])


def _settle(
    weight: Tensor, hessian: Tensor, order: Tensor, group_size: int, options: GptqOptions, settling: Settling
) -> tuple[CodedColumns, float]:
    """GPTQ and its refinement. `hessian` is in `order` already; returns codes in that order, and the damping."""
    is_unused = hessian.diagonal() == 0
    inverse_root, damp = inverse_cholesky(hessian, options.damp)
    lower = inverse_root.t()

    def settle(rows: Tensor) -> CodedColumns:
        columns = rows.t()[order].to(torch.float32).contiguous()  # (in, out): one input's weights are contiguous
        columns[is_unused] = 0.0  # never used: any value is right, and 0 costs no range
        coded = _quantize_columns(columns.clone(), lower, group_size, options.grid, settling)
        if not options.refine_sweeps:
            return coded
        return refine(columns, hessian, coded, options.bits, options.refine_sweeps, settling)

    return settle_in_parts(settle, weight), damp


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

    One more matrix of the Hessian's size is in memory, which becomes the result; its columns are contiguous. Inputs
    that never occur (zero diagonal) count as 1. Raises QuantizationError when damping up to MAX_DAMP fails.
    """
    diagonal = hessian.diagonal()
    unused = torch.where(diagonal == 0, 1.0, 0.0)
    mean = float((diagonal + unused).mean())
    work = torch.empty(hessian.shape)
    tried = damp
    while tried <= MAX_DAMP * 1.001:
        work.copy_(hessian)
        work.diagonal().add_(unused + tried * mean)
        if _become_root_of_inverse(work):
            return work.t(), tried
        tried *= DAMP_GROWTH
    raise QuantizationError(
        f"the Hessian is not positive definite even with {MAX_DAMP:g} times its mean diagonal added; "
        "give more, or more varied, calibration text"
    )


def _become_root_of_inverse(work: Tensor) -> bool:
    """Turn a symmetric matrix into the transposed upper factor of its inverse, in place; False if it is not positive
    definite, and then it is spoilt."""
    transposed = work.t()  # how LAPACK sees it: what has this layout is factored without a copy
    failed = torch.zeros((), dtype=torch.int32)
    torch.linalg.cholesky_ex(transposed, out=(transposed, failed))
    if int(failed):
        return False
    torch.cholesky_inverse(transposed, out=transposed)
    torch.linalg.cholesky_ex(transposed, upper=True, out=(transposed, failed))
    return not int(failed) and is_finite(work)


def output_error(weight: Tensor, matrix: QuantizedMatrix, hessian: Tensor) -> float:
    """Squared error of the outputs over their squared norm. Arguments as of `output_errors`."""
    return relative_error(output_errors(weight, matrix, hessian))


def relative_error(errors: Tensor) -> float:
    """errors: (2, out), as `output_errors` returns them, of the outputs that count."""
    wrong, whole = (float(row.sum()) for row in errors)
    return wrong / whole if whole > 0 else 0.0


def output_errors(weight: Tensor, matrix: QuantizedMatrix, hessian: Tensor) -> Tensor:
    """(2, out) float64: each output's mean squared error, and its mean square.

    weight: (out, in), any floating type; hessian: (in, in) float32
    """
    errors = torch.empty((2, weight.shape[0]), dtype=torch.float64)
    runs = zip(weight.split(ERROR_ROWS), split_rows(matrix, _run_lengths(weight.shape[0])), strict=True)
    for index, (rows, run) in enumerate(runs):
        whole = rows.to(torch.float32)
        wrong = whole - run.dequantize()
        inside = slice(index * ERROR_ROWS, index * ERROR_ROWS + rows.shape[0])
        errors[0, inside] = (wrong @ hessian).mul_(wrong).sum(dim=1)
        errors[1, inside] = (whole @ hessian).mul_(whole).sum(dim=1)
    return errors


def _run_lengths(rows: int) -> list[int]:
    return [min(ERROR_ROWS, rows - start) for start in range(0, rows, ERROR_ROWS)]


def round_to_nearest(weight: Tensor, options: GptqOptions, importance: Tensor | None = None) -> QuantizedMatrix:
    """The same grids without error feedback: what GPTQ is measured against. importance: (in,), 1 if absent."""
    group_size = _inputs_of_group(weight.shape[1], options)
    columns = weight.detach().to(torch.float32).t().contiguous()
    weights = torch.ones(weight.shape[1]) if importance is None else importance.contiguous()
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


def _fixed_grids(columns: Tensor, importance: Tensor, group_size: int, options: GptqOptions) -> list[Grid]:
    """Grids of all groups in natural order, from columns (in, out) as they are."""
    settling = fastest_settling()
    return [
        settling.find_grid(columns[start : start + group_size], importance[start : start + group_size], options.grid)
        for start in range(0, columns.shape[0], group_size)
    ]


def _quantize_columns(
    columns: Tensor, lower: Tensor, group_size: int, kind: GridKind, settling: Settling
) -> CodedColumns:
    """Quantise one column after another, each passing its error on to those still open.

    columns: (in, out) float32 in the order of quantisation, used up
    lower:   (in, in) lower triangular, in the same order: the root of the Hessian's inverse, transposed
    Each group's grid is chosen when its first column comes, from the weights as they are then.
    """
    num_columns, num_rows = columns.shape
    codes = torch.empty((num_columns, num_rows), dtype=torch.uint8)
    errors = torch.empty((num_columns, num_rows))
    # What is left of a column's error once those still open have made up for it.
    importance = lower.diagonal().pow(-2)
    grids: list[Grid] = []
    # Errors travel at once within a small block, at its end within the large, at that one's end everywhere. Every
    # group begins on a border of both, so a grid chosen at a group's first column sees weights that are up to date.
    large = group_size * math.ceil(LARGE_BLOCK / group_size)
    small = math.gcd(group_size, SMALL_BLOCK)
    for start in range(0, num_columns, small):
        block = slice(start, start + small)
        large_stop = min(start // large * large + large, num_columns)
        if start % group_size == 0:
            ahead = slice(start, start + group_size)
            grids.append(settling.find_grid(columns[ahead], importance[ahead], kind))
        settling.feed_back(columns[block], lower[block, block], grids[-1], kind.bits, codes[block], errors[block])
        _pass_on(errors, lower, columns, block, slice(block.stop, large_stop))
        if block.stop == large_stop:
            _pass_on(errors, lower, columns, slice(start // large * large, block.stop), slice(block.stop, num_columns))
    return CodedColumns(codes, torch.stack([grid.scale for grid in grids]), torch.stack([grid.zero for grid in grids]))


def _pass_on(errors: Tensor, lower: Tensor, columns: Tensor, done: slice, still_open: slice) -> None:
    if still_open.start < still_open.stop:
        columns[still_open].addmm_(lower[still_open, done], errors[done], alpha=-1.0)
