"""The codes in a GGUF file as GPTQ matrices, so that a model quantised to 4 or 8 bits is not rounded a second time.

The way back of `quant.convert.export`: Q4_0 and Q8_0 are GPTQ codes bit for bit; Q4_1 is where every minimum is a whole
number of steps below zero, as in files that were GPTQ before. What a whole file makes is up to `gguf_conversion`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from quant.formats.gguf import GgufFile, TensorInfo, half_numbers, nibbles
from quant.formats.gguf_blocks import BLOCK, Q4_0_ZERO, Q8_0_ZERO
from quant.method.matrix import QuantizedMatrix
from quant.method.packing import codes_per_word

Bytes: TypeAlias = "NDArray[np.uint8]"
Floats: TypeAlias = "NDArray[np.float32]"

_BITS: Final[Mapping[str, int]] = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
_LAYERS: Final = "blk."


def layer_linears(file: GgufFile) -> Iterator[TensorInfo]:
    for tensor in file.tensors.values():
        if tensor.name.startswith(_LAYERS) and len(tensor.shape) == 2:
            yield tensor


def holds_gptq_codes(file: GgufFile) -> bool:
    """Whether every linear of every layer is codes that a GPTQ file holds as they are."""
    linears = list(layer_linears(file))
    return bool(linears) and all(_is_gptq(file, tensor) for tensor in linears)


def read_matrix(file: GgufFile, tensor: TensorInfo) -> QuantizedMatrix:
    """The tensor's codes, in groups of 32. ValueError where a GPTQ file cannot hold them (`holds_gptq_codes`)."""
    blocks = _blocks(file, tensor)  # (out, in / 32, bytes of a block)
    scales = _halves(blocks, 0)
    bits, kind = _BITS[tensor.type.name], tensor.type.name
    if kind == "Q8_0":
        codes = blocks[:, :, 2:] ^ np.uint8(Q8_0_ZERO)  # from int8 to what is subtracted from
        zeros = np.full(scales.shape, Q8_0_ZERO, np.uint8)
    elif kind == "Q4_0":
        codes, zeros = nibbles(blocks[:, :, 2:]), np.full(scales.shape, Q4_0_ZERO, np.uint8)
    else:
        codes, zeros = nibbles(blocks[:, :, 4:]), zero_points(scales, _halves(blocks, 2))
    if zeros is None:
        raise ValueError(f"{tensor.name} has minimums that are no whole number of steps")
    return QuantizedMatrix(
        codes=torch.from_numpy(codes.reshape(tensor.shape)),
        scales=torch.from_numpy(scales),
        zeros=torch.from_numpy(zeros),
        bits=bits,
        group_size=BLOCK,
    )


def zero_points(scales: Floats, minimums: Floats) -> Bytes | None:
    """1 to 15 for each block of Q4_1 whose minimum is the fp16 of -scale * zero point; None if there is any other.

    scales, minimums: (out, blocks), exact in fp16.
    """
    # A block of zeros has no step, and any zero point.
    zeros = np.rint(np.divide(-minimums, scales, out=np.full_like(scales, Q4_0_ZERO), where=scales != 0))
    if not bool(((zeros >= 1) & (zeros <= 15)).all()):
        return None
    with np.errstate(over="ignore"):
        are_exact = (-scales * zeros).astype(np.float16) == minimums.astype(np.float16)
    return zeros.astype(np.uint8) if bool(are_exact.all()) else None


def _is_gptq(file: GgufFile, tensor: TensorInfo) -> bool:
    bits = _BITS.get(tensor.type.name)
    if bits is None or tensor.shape[0] % codes_per_word(bits) or tensor.shape[1] % BLOCK:
        return False
    blocks = _blocks(file, tensor)
    scales = _halves(blocks, 0)
    # Weights that are not finite are refused by name where they are quantised.
    if not bool(np.isfinite(scales).all()):
        return False
    if tensor.type.name != "Q4_1":
        return True
    minimums = _halves(blocks, 2)
    return bool(np.isfinite(minimums).all()) and zero_points(scales, minimums) is not None


def _halves(blocks: Bytes, offset: int) -> Floats:
    """(out, in / 32): the fp16 number that every block has at this byte."""
    return half_numbers(blocks[:, :, offset : offset + 2])[:, :, 0]


def _blocks(file: GgufFile, tensor: TensorInfo) -> Bytes:
    return file.read_bytes(tensor.name).reshape(tensor.shape[0], -1, tensor.type.block_bytes)
