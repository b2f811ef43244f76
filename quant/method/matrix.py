"""One quantised weight matrix as plain tensors: integer codes, and a scale and a zero point for each group of inputs.

Everything that quantises, stores or multiplies speaks in terms of this record. Packing into machine words belongs to
`quant.method.packing`, fast products to `quant.int4_linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Why a fast product refuses a matrix; for messages.
SHUFFLED_GROUPS = "its inputs are not grouped in order (true act-order, or a short last group)"


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """weight[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g], with g = i // group_size or group_of_input[i].

    codes:          (out, in) uint8, each below 2**bits
    scales:         (out, groups) float32, every value representable in fp16
    zeros:          (out, groups) uint8
    group_of_input: (in,) int32 where groups are not runs of `group_size` neighbours (true act-order, or a short last
                    group); None where they are, and then `in` is a multiple of `group_size`
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int
    group_of_input: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.dim() != 2:
            raise ValueError(f"codes must be (out, in); found shape {tuple(self.codes.shape)}")
        out_features, in_features = self.codes.shape
        if self.group_of_input is not None:
            _check_group_of_input(self.group_of_input, in_features, self.scales.shape[1])
        elif self.group_size < 1 or in_features % self.group_size:
            raise ValueError(f"{in_features} inputs are not a multiple of group size {self.group_size}")
        is_trivial = self.group_of_input is None
        groups = (out_features, in_features // self.group_size if is_trivial else self.scales.shape[1])
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
        if self.group_of_input is not None:
            weight = self.codes.to(torch.float32)
            weight -= self.zeros.to(torch.float32)[:, self.group_of_input]
            return weight.mul_(self.scales[:, self.group_of_input]).to(dtype)
        grouped = self.codes.view(out_features, -1, self.group_size).to(torch.float32)
        grouped -= self.zeros.to(torch.float32).unsqueeze(-1)
        grouped *= self.scales.unsqueeze(-1)
        return grouped.view(out_features, in_features).to(dtype)


def _check_group_of_input(group_of_input: Tensor, in_features: int, num_groups: int) -> None:
    if tuple(group_of_input.shape) != (in_features,) or group_of_input.dtype != torch.int32:
        raise ValueError(
            f"group_of_input must be ({in_features},) int32; found {tuple(group_of_input.shape)} {group_of_input.dtype}"
        )
    if in_features and not 0 <= int(group_of_input.min()) <= int(group_of_input.max()) < num_groups:
        raise ValueError(
            f"group_of_input must lie in 0..{num_groups - 1}; "
            f"found {int(group_of_input.min())}..{int(group_of_input.max())}"
        )


def have_equal_groups(matrices: Sequence[QuantizedMatrix]) -> bool:
    """Whether `concat_rows` takes them: the same inputs, bits and groups."""
    first = matrices[0]
    return all(
        (matrix.in_features, matrix.bits, matrix.group_size) == (first.in_features, first.bits, first.group_size)
        and _are_equal(matrix.group_of_input, first.group_of_input)
        for matrix in matrices[1:]
    )


def _are_equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


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
        if not _are_equal(matrix.group_of_input, first.group_of_input):
            raise ValueError("cannot stack matrices whose inputs are grouped in different orders")
    return QuantizedMatrix(
        codes=torch.cat([matrix.codes for matrix in matrices]),
        scales=torch.cat([matrix.scales for matrix in matrices]),
        zeros=torch.cat([matrix.zeros for matrix in matrices]),
        bits=first.bits,
        group_size=first.group_size,
        group_of_input=first.group_of_input,
    )


def split_rows(matrix: QuantizedMatrix, sizes: Sequence[int]) -> list[QuantizedMatrix]:
    """The inverse of `concat_rows`: consecutive runs of `sizes` outputs."""
    parts = zip(
        matrix.codes.split(list(sizes)), matrix.scales.split(list(sizes)), matrix.zeros.split(list(sizes)), strict=True
    )
    return [
        QuantizedMatrix(
            codes.clone(), scales.clone(), zeros.clone(), matrix.bits, matrix.group_size, matrix.group_of_input
        )
        for codes, scales, zeros in parts
    ]


def take_outputs(matrix: QuantizedMatrix, outputs: slice | Tensor) -> QuantizedMatrix:
    """Some outputs of it: a run of them, sharing memory, or those of these numbers, (n,) int64."""
    return replace(matrix, codes=matrix.codes[outputs], scales=matrix.scales[outputs], zeros=matrix.zeros[outputs])
