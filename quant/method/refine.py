"""Coordinate descent on one quantised matrix: after GPTQ, which never looks back, each code and scale is settled again.

Pure functions. The objective is GPTQ's own, the squared error of the outputs; rows do not influence each other. Each
step (`quant.method.settling`) moves one input's codes, or one group's scales, to their best values with all others as
they are, so the error never rises. A sweep costs about as much as GPTQ itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.method.settling import Settling


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

    def dequantize(self) -> Tensor:
        """(in, out) float32."""
        reached = self.codes.to(torch.float32)
        reached.unflatten(0, (-1, self.group_size)).sub_(self.zeros.unsqueeze(1)).mul_(self.scales.unsqueeze(1))
        return reached


def refine(
    columns: Tensor, hessian: Tensor, coded: CodedColumns, bits: int, sweeps: int, settling: Settling
) -> CodedColumns:
    """`coded` after `sweeps` rounds of descent on the error of its outputs.

    columns: (in, out) float32, the weight to reach
    hessian: (in, in) float32, undamped, inputs in the order of `columns`
    """
    size = coded.group_size
    codes, scales, zeros = coded.codes.clone(), coded.scales.clone(), coded.zeros
    slope = hessian @ coded.dequantize().neg_().add_(columns)  # (in, out), minus half the error's gradient
    for _ in range(sweeps):
        for group in range(scales.shape[0]):
            inside = slice(group * size, group * size + size)
            moved = settling.refine_group(
                codes[inside], scales[group], zeros[group], slope[inside], hessian[inside, inside], bits
            )
            slope.addmm_(hessian[:, inside], moved, alpha=-1.0)
    return CodedColumns(codes, scales, zeros)
