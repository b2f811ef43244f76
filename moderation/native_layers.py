"""The encoder's layers in one call of the native library. quant/native/encoder.c is the other side."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moderation.encoder_layers import MAX_TOKENS, EncoderShape, FloatArray, LayerWeights, Matrix
from quant.native.large_pages import LargePages
from quant.native.library import load_library
from quant.native.packing import CMatrix, by_block, pack_codes

__all__ = ["NativeLayers", "why_not_native"]

# Inputs that share a scale of their activations.
GROUP = 32
HEAD_MULTIPLE, MAX_HEAD = 16, 64
LONGEST_TEXT = 128
MIDDLE = 128


class CLayer(ctypes.Structure):
    """`EncoderLayer` of encoder.c."""

    _fields_ = (
        ("qkv", CMatrix),
        ("out", CMatrix),
        ("up", CMatrix),
        ("down", CMatrix),
        ("attention_weight", ctypes.c_void_p),
        ("attention_bias", ctypes.c_void_p),
        ("output_weight", ctypes.c_void_p),
        ("output_bias", ctypes.c_void_p),
    )


class CModel(ctypes.Structure):
    """`EncoderModel` of encoder.c."""

    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("num_layers", ctypes.c_int32),
        ("hidden", ctypes.c_int32),
        ("inner", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("eps", ctypes.c_float),
    )


def why_not_native(shape: EncoderShape) -> str | None:
    """None if the native layers take this shape on this machine, else the reason."""
    head = shape.hidden // shape.heads
    if shape.hidden % GROUP or shape.inner % GROUP or head % HEAD_MULTIPLE or head > MAX_HEAD:
        return f"they take multiples of {GROUP}, and heads of {HEAD_MULTIPLE} to {MAX_HEAD}; these are {shape}"
    return None if load_library() is not None else "there is no native library on this machine"


class NativeLayers:
    """On one thread; calls wait for each other. Holds what the native side points to."""

    def __init__(self, layers: Sequence[LayerWeights], shape: EncoderShape) -> None:
        library = load_library()
        if library is None:
            raise RuntimeError("there is no native library; ask why_not_native first")
        assert MAX_TOKENS <= LONGEST_TEXT
        self._encode = library.causerie_encode
        self._memory = LargePages()
        self._held: list[npt.NDArray[np.generic]] = []
        self._layers = (CLayer * len(layers))(*map(self._c_layer, layers))
        self._model = CModel(
            ctypes.addressof(self._layers), len(layers), shape.hidden, shape.inner, shape.heads, shape.eps
        )

    def __call__(self, states: FloatArray, ends: Sequence[int]) -> FloatArray:
        changed = np.array(states, np.float32, order="C")
        stops = np.asarray(ends, np.int32)
        lengths = np.diff(stops, prepend=0)
        if stops[-1] != len(changed) or lengths.min() < 1 or lengths.max() > LONGEST_TEXT:
            raise ValueError(f"texts end at {list(ends)} of {len(changed)} tokens; each may have 1 to {LONGEST_TEXT}")
        self._encode(ctypes.byref(self._model), _pointer(changed), _pointer(stops), len(stops), 1)
        return changed

    def _c_layer(self, layer: LayerWeights) -> CLayer:
        norms = (self._keep(array) for norm in (layer.attention_norm, layer.output_norm) for array in norm)
        return CLayer(*map(self._c_matrix, (layer.qkv, layer.out, layer.up, layer.down)), *norms)

    def _c_matrix(self, matrix: Matrix) -> CMatrix:
        outs, ins = matrix.codes.shape
        codes = (matrix.codes.astype(np.int16) + MIDDLE).astype(np.uint8)
        scales = np.repeat(matrix.scales.astype(np.float16)[:, None], ins // GROUP, axis=1)
        return CMatrix(
            self._keep(pack_codes(codes, 8)),
            self._keep(by_block(scales)),
            None,
            None,
            self._keep(matrix.bias),
            ins,
            outs,
            GROUP,
            8,
        )

    def _keep(self, array: npt.NDArray[np.generic]) -> int:
        self._held.append(self._memory.copy(array))
        return self._held[-1].ctypes.data


def _pointer(array: npt.NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
