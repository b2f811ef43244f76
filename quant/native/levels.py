"""8-bit matrices whose groups use at most 16 evenly spaced levels, as 4-bit codes with a scale and an offset: half the
bytes to read.

A model that had 4 bits before (a Q4_1 file, for one) lies on such levels, but on other ones than a GPTQ file can say,
whose zero points are whole codes. Its matrices that GPTQ keeps in 8 bits are the old levels, each rounded to a 255th
of the range; finding the levels again undoes that rounding rather than adding to it. Other 8-bit matrices are not on
any 16 levels, and stay what they are. The plain path never does this.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.method.matrix import QuantizedMatrix
from quant.native.library import load_library

__all__ = ["MAX_RELATIVE_ERROR", "LevelledMatrix", "find_levels", "search_levels_plainly"]

# Of the norm of the weights of any one output. Rounding activations to int8 costs 0.005 of theirs; 16 levels laid
# through weights that are on none cost 0.07 and more.
MAX_RELATIVE_ERROR = 0.02
LEVELS, CENTRE = 16, 8
# Tried first: on another model's matrix this is all that is lost.
SAMPLED_ROWS = 16
LARGEST_GROUP = 1024
GOOD_ENOUGH, REFINEMENTS = 0.13, 2


@dataclass(frozen=True, slots=True)
class LevelledMatrix:
    """weight[o, i] = (codes[o, i] - 8) * scales[o, g] + offsets[o, g], with g = i // group_size.

    codes: (out, in) uint8, below 16. scales, offsets: (out, groups) float32, every value representable in fp16.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor
    group_size: int

    def dequantize(self) -> Tensor:
        """(out, in) float32."""
        grouped = self.codes.unflatten(1, (-1, self.group_size)).to(torch.float32) - CENTRE
        return (grouped * self.scales.unsqueeze(-1) + self.offsets.unsqueeze(-1)).flatten(1)


@dataclass(frozen=True, slots=True)
class _Found:
    """levels: (groups, size) uint8. The others (groups,) float32, in codes: errors and squares are summed squares."""

    levels: Tensor
    steps: Tensor
    lowest: Tensor
    errors: Tensor
    sums: Tensor
    squares: Tensor


def find_levels(matrix: QuantizedMatrix) -> LevelledMatrix | None:
    """The same matrix on 16 levels a group, or None if it does not lie on any. Needs the native library."""
    if matrix.bits != 8 or matrix.group_size > LARGEST_GROUP:
        return None
    sample = slice(0, matrix.out_features, max(1, matrix.out_features // SAMPLED_ROWS))
    rows = QuantizedMatrix(
        matrix.codes[sample].contiguous(), matrix.scales[sample], matrix.zeros[sample], matrix.bits, matrix.group_size
    )
    return None if _on_levels(rows) is None else _on_levels(matrix)


def _on_levels(matrix: QuantizedMatrix) -> LevelledMatrix | None:
    found = _search(matrix.codes.view(-1, matrix.group_size))
    shape = matrix.scales.shape
    steps, lowest = found.steps.view(shape), found.lowest.view(shape)
    scales = (steps * matrix.scales).to(torch.float16).to(torch.float32)
    offsets = (lowest - matrix.zeros) * matrix.scales + CENTRE * scales
    offsets = offsets.to(torch.float16).to(torch.float32)
    levelled = LevelledMatrix(found.levels.view(matrix.codes.shape), scales, offsets, matrix.group_size)
    return levelled if float(_relative_errors(found, matrix).max()) <= MAX_RELATIVE_ERROR else None


def _relative_errors(found: _Found, matrix: QuantizedMatrix) -> Tensor:
    """(out,): norm of the weights' differences over that of the weights, fp16's rounding left out."""
    shape = matrix.scales.shape
    zeros, weights = matrix.zeros.to(torch.float32), matrix.scales.square()
    squares = found.squares.view(shape) - 2 * zeros * found.sums.view(shape) + matrix.group_size * zeros.square()
    wrong, whole = (found.errors.view(shape) * weights).sum(1), (squares * weights).sum(1)
    return (wrong / whole.clamp_min(torch.finfo(torch.float32).tiny)).sqrt()


def _search(codes: Tensor) -> _Found:
    library = load_library()
    assert library is not None
    codes = codes.contiguous()
    num_groups, size = codes.shape
    levels = torch.empty_like(codes)
    numbers = torch.empty(5, num_groups).unbind()
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (codes, levels, *numbers)]
    library.causerie_find_levels(pointers[0], num_groups, size, *pointers[1:], torch.get_num_threads())
    return _Found(levels, *numbers)


def search_levels_plainly(codes: Tensor) -> tuple[Tensor, Tensor]:
    """codes (groups, size) uint8 -> the nearest level's value, in codes, and its summed squared errors (groups,).

    The twin of levels.c: from 15 steps between a group's ends down to 1, the first that is good enough, else the best.
    """
    values = codes.to(torch.float32)
    low, high = values.amin(1), values.amax(1)
    best = torch.full_like(low, torch.inf)
    nearest = values.clone()
    for steps in range(LEVELS - 1, 0, -1):
        lowest = low
        step = torch.where(high > low, (high - low) / steps, 1.0)
        for _ in range(REFINEMENTS):
            level = _level_of(values, lowest, step)
            mean_level, mean_value = level.mean(1), values.mean(1)
            variance = level.square().mean(1) - mean_level.square()
            slope = ((level * values).mean(1) - mean_level * mean_value) / variance.clamp_min(1e-9)
            step = torch.where((variance > 0) & (slope > 0), slope, step)
            lowest = mean_value - step * mean_level
        reached = lowest.unsqueeze(1) + _level_of(values, lowest, step) * step.unsqueeze(1)
        error = (values - reached).square().sum(1)
        is_better = (best > GOOD_ENOUGH * codes.shape[1]) & (error < best)
        best = torch.where(is_better, error, best)
        nearest = torch.where(is_better.unsqueeze(1), reached, nearest)
    return nearest, best


def _level_of(values: Tensor, lowest: Tensor, step: Tensor) -> Tensor:
    return ((values - lowest.unsqueeze(1)) / step.unsqueeze(1)).round().clamp(0, LEVELS - 1)
