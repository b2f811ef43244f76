"""The steps of `quant.method.settling` in C (settling.c). Nothing is copied; the interpreter lock is free meanwhile."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from quant.errors import QuantizationError
from quant.method.grids import RANGE_SHRINKAGES, Grid, GridKind
from quant.method.scales import MAX_SCALE


class NativeSettling:
    """See `quant.method.settling.Settling` for what each step does; sums run in another order than the twin's."""

    name = "native"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._find_grid = library.causerie_find_grid
        self._feed_back = library.causerie_feed_back
        self._refine_group = library.causerie_refine_group
        for function in (self._find_grid, self._feed_back, self._refine_group):
            function.restype = None

    def find_grid(self, group: Tensor, importance: Tensor, kind: GridKind) -> Grid:
        size, outputs = group.shape
        scale, zero = torch.empty(2, outputs).unbind()
        shrinkages = RANGE_SHRINKAGES if kind.range_search else ()
        self._find_grid(
            _pointer(group),
            _pointer(importance),
            size,
            outputs,
            kind.bits,
            int(kind.symmetric),
            (ctypes.c_float * len(shrinkages))(*shrinkages),
            len(shrinkages),
            _pointer(scale),
            _pointer(zero),
        )
        if not bool(scale.isfinite().all()):
            raise QuantizationError(f"a group needs a scale beyond {MAX_SCALE:g}, the most that fp16 holds")
        return Grid(scale, zero)

    def feed_back(self, columns: Tensor, lower: Tensor, grid: Grid, bits: int, codes: Tensor, errors: Tensor) -> None:
        size, outputs = columns.shape
        self._feed_back(
            _pointer(columns),
            _pointer_to_rows(lower),
            ctypes.c_int64(lower.stride(0)),
            size,
            outputs,
            _pointer(grid.scale),
            _pointer(grid.zero),
            bits,
            _pointer(codes),
            _pointer(errors),
        )

    def refine_group(
        self, codes: Tensor, scale: Tensor, zero: Tensor, slope: Tensor, hessian: Tensor, bits: int
    ) -> Tensor:
        size, outputs = codes.shape
        moved = torch.empty_like(slope)
        self._refine_group(
            _pointer(codes),
            _pointer(scale),
            _pointer(zero),
            _pointer(slope),
            _pointer_to_rows(hessian),
            ctypes.c_int64(hessian.stride(0)),
            size,
            outputs,
            bits,
            _pointer(moved),
        )
        return moved


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    assert tensor.dtype in (torch.float32, torch.uint8)
    return ctypes.c_void_p(tensor.data_ptr())


def _pointer_to_rows(square: Tensor) -> ctypes.c_void_p:
    """Of a square part of a larger matrix: its rows are contiguous, but not one after another."""
    assert square.stride(1) == 1
    assert square.dtype == torch.float32
    return ctypes.c_void_p(square.data_ptr())
