"""One quantised weight matrix as plain tensors: integer codes, and a scale and a zero point for each group of inputs.

Everything that quantises, stores or multiplies speaks in terms of this record. Packing into machine words belongs to
`quant.packing`, fast products to `quant.int4_linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """weight[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g], with g = i // group_size.

    codes:  (out, in) uint8, each below 2**bits
    scales: (out, groups) float32, every value representable in fp16
    zeros:  (out, groups) uint8
    The last group may not be short: `in` is a multiple of `group_size`.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        if self.codes.dim() != 2:
            raise ValueError(f"codes must be (out, in); found shape {tuple(self.codes.shape)}")
        out_features, in_features = self.codes.shape
        if self.group_size < 1 or in_features % self.group_size:
            raise ValueError(f"{in_features} inputs are not a multiple of group size {self.group_size}")
        groups = (out_features, in_features // self.group_size)
        if tuple(self.scales.shape) != groups or tuple(self.zeros.shape) != groups:
            raise ValueError(
                f"scales and zeros must be {groups}; found {tuple(self.scales.shape)} and {tuple(self.zeros.shape)}"
            )
        if self.codes.dtype != torch.uint8 or self.zeros.dtype != torch.uint8 or self.scales.dtype != torch.float32:
            raise ValueError("codes and zeros must be uint8 and scales float32")

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight, (out, in), computed in float32 and then rounded to `dtype`."""
        out_features, in_features = self.codes.shape
        grouped = self.codes.view(out_features, -1, self.group_size).to(torch.float32)
        grouped -= self.zeros.to(torch.float32).unsqueeze(-1)
        grouped *= self.scales.unsqueeze(-1)
        return grouped.view(out_features, in_features).to(dtype)


def concat_rows(matrices: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """Stack matrices that read the same input (q/k/v, gate/up) into one. Raises ValueError if their grids differ."""
    if not matrices:
        raise ValueError("at least one matrix is needed")
    first = matrices[0]
    for matrix in matrices[1:]:
        found = (matrix.in_features, matrix.bits, matrix.group_size)
        expected = (first.in_features, first.bits, first.group_size)
        if found != expected:
            raise ValueError(f"cannot stack matrices: (inputs, bits, group size) {found} differs from {expected}")
    return QuantizedMatrix(
        codes=torch.cat([matrix.codes for matrix in matrices]),
        scales=torch.cat([matrix.scales for matrix in matrices]),
        zeros=torch.cat([matrix.zeros for matrix in matrices]),
        bits=first.bits,
        group_size=first.group_size,
    )


def split_rows(matrix: QuantizedMatrix, sizes: Sequence[int]) -> list[QuantizedMatrix]:
    """The inverse of `concat_rows`: consecutive runs of `sizes` outputs."""
    parts = zip(
        matrix.codes.split(list(sizes)), matrix.scales.split(list(sizes)), matrix.zeros.split(list(sizes)), strict=True
    )
    return [
        QuantizedMatrix(codes.clone(), scales.clone(), zeros.clone(), matrix.bits, matrix.group_size)
        for codes, scales, zeros in parts
    ]
