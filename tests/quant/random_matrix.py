"""A quantised matrix of random codes, scales and zero points."""

from __future__ import annotations

import torch

from quant.method.matrix import QuantizedMatrix


def random_matrix(bits: int, group_size: int, *, symmetric: bool, rows: int = 8, columns: int = 128) -> QuantizedMatrix:
    generator = torch.Generator().manual_seed(bits * group_size)
    groups = columns // group_size

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int64).to(torch.uint8)

    middle = 2 ** (bits - 1)
    zeros = torch.full((rows, groups), middle, dtype=torch.uint8) if symmetric else integers(1, 2**bits, rows, groups)
    # A scale may be negative: GPTQ says nothing against it.
    scales = (torch.randn((rows, groups), generator=generator) * 0.16 / 2**bits).to(torch.float16).to(torch.float32)
    return QuantizedMatrix(integers(0, 2**bits, rows, columns), scales, zeros, bits, group_size)
