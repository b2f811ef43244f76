"""Reads packed linears a second time, in numpy and from the format's description alone.

Shares no code with `quant.method.packing` and `quant.formats.autogptq`, so that a mistake there cannot hide itself:
what is published is what this module understands of the written file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open


def stored_weight(
    file: Path, linear: str, *, zero_offset: int = 1, outputs: slice = slice(None)
) -> NDArray[np.float32]:
    """(out, in) float32: the weight that a reader makes of the four tensors of `linear`.

    zero_offset: what the reader adds to a stored zero point, 1 in version 1 and 0 in version 2
    outputs:     those to read, all unless a run is given that begins and ends at a multiple of 8
    """
    with safe_open(file, framework="np") as tensors:
        qweight, scales = (tensors.get_slice(f"{linear}.{part}")[:, outputs] for part in ("qweight", "scales"))
        g_idx = tensors.get_tensor(f"{linear}.g_idx")
        pack = g_idx.shape[0] // qweight.shape[0]
        words = slice(*(None if end is None else -(-end // pack) for end in (outputs.start, outputs.stop)))
        qzeros = tensors.get_slice(f"{linear}.qzeros")[:, words]
    return weight_from_words(qweight, qzeros, scales, g_idx, zero_offset=zero_offset)


def rows_of_head_parts(weight: NDArray[np.float32], part: int, head_dim: int) -> NDArray[np.float32]:
    """Of a fused linear with rows by head, then q, k, v, then dimension: the rows of part 0, 1 or 2, (out / 3, in)."""
    row = np.arange(weight.shape[0])
    return np.ascontiguousarray(weight[row // head_dim % 3 == part])


def weight_from_words(
    qweight: NDArray[np.int32],
    qzeros: NDArray[np.int32],
    scales: NDArray[np.float16],
    g_idx: NDArray[np.int32],
    *,
    zero_offset: int = 1,
) -> NDArray[np.float32]:
    """qweight (in / pack, out), qzeros (groups, out / pack), scales (groups, out), g_idx (in,) -> (out, in)."""
    num_inputs, num_outputs = g_idx.shape[0], scales.shape[1]
    pack = num_inputs // qweight.shape[0]
    mask = np.uint32(2 ** (32 // pack) - 1)
    codes = np.empty((num_inputs, num_outputs), np.float32)
    zeros = np.empty((scales.shape[0], num_outputs), np.float32)
    for position in range(pack):
        shift = np.uint32(32 // pack * position)
        codes[position::pack] = (qweight.view(np.uint32) >> shift) & mask
        zeros[:, position::pack] = ((qzeros.view(np.uint32) >> shift) & mask) + zero_offset
    weight = (codes - zeros[g_idx]) * scales.astype(np.float32)[g_idx]
    return np.ascontiguousarray(weight.T)
