"""The encoder's layers: plainly in numpy, which is the twin, and through the native kernels where they are right.

Matrices are stored as 8-bit codes with one scale a row. The native kernels multiply the codes with int8 activations;
a logit differs by about a hundredth.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from moderation.errors import ModerationError
from moderation.weight_files import Tensors

__all__ = [
    "EMBEDDING_GROUP",
    "MAX_TOKENS",
    "EncoderShape",
    "FloatArray",
    "LayerWeights",
    "Layers",
    "PlainLayers",
    "as_floats",
    "choose_layers",
    "expect",
    "normalise",
    "read_layer",
    "read_norm",
]

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]

EMBEDDING_GROUP = 32
# Longer runs are cut; the policy's windows are shorter than this.
MAX_TOKENS = 128
GELU_SLOPE = 0.7978845608028654  # sqrt(2 / pi)
# Between the layers natively and plainly, on the states of a made-up text. Rounded activations cost about 0.01.
LARGEST_ERROR = 0.05
CHECK_TOKENS, CHECK_LAYERS = 7, 2


@dataclass(frozen=True, slots=True)
class EncoderShape:
    vocab: int
    hidden: int
    layers: int
    heads: int
    inner: int
    positions: int
    eps: float

    def __post_init__(self) -> None:
        sizes = (self.vocab, self.hidden, self.layers, self.heads, self.inner, self.positions)
        if min(sizes) < 1 or self.hidden % self.heads or self.hidden % EMBEDDING_GROUP or self.positions < MAX_TOKENS:
            raise ModerationError(
                f"encoder sizes {sizes} cannot be used; expected positive ones, hidden a multiple of the heads and of "
                f"{EMBEDDING_GROUP}, and at least {MAX_TOKENS} positions"
            )


@dataclass(frozen=True, slots=True)
class Matrix:
    """codes: (out, in) int8; scales, bias: (out,) float32. A weight is its code times its row's scale."""

    codes: npt.NDArray[np.int8]
    scales: FloatArray
    bias: FloatArray

    def dequantize(self) -> FloatArray:
        """(in, out), ready for `states @ matrix`."""
        return (self.codes.astype(np.float32) * self.scales[:, None]).T.copy()


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """`*_norm`: weight and bias, (hidden,) each."""

    qkv: Matrix
    out: Matrix
    attention_norm: tuple[FloatArray, FloatArray]
    up: Matrix
    down: Matrix
    output_norm: tuple[FloatArray, FloatArray]


class Layers(Protocol):
    def __call__(self, states: FloatArray, ends: Sequence[int]) -> FloatArray:
        """(tokens, hidden) through all layers. ends: where each text's tokens end; no text sees another."""
        ...


class PlainLayers:
    def __init__(self, layers: Sequence[LayerWeights], shape: EncoderShape) -> None:
        self._layers = layers
        self._matrices = [
            {name: getattr(layer, name).dequantize() for name in ("qkv", "out", "up", "down")} for layer in layers
        ]
        self._shape = shape

    def __call__(self, states: FloatArray, ends: Sequence[int]) -> FloatArray:
        spans = [slice(start, end) for start, end in zip((0, *ends[:-1]), ends, strict=True)]
        for layer, matrices in zip(self._layers, self._matrices, strict=True):
            states = self._apply(layer, matrices, states, spans)
        return states

    def _apply(
        self, layer: LayerWeights, matrices: Mapping[str, FloatArray], states: FloatArray, spans: Sequence[slice]
    ) -> FloatArray:
        eps = self._shape.eps
        qkv = states @ matrices["qkv"] + layer.qkv.bias
        mixed = np.concatenate([self._attend(qkv[span]) for span in spans])
        states = normalise(states + mixed @ matrices["out"] + layer.out.bias, layer.attention_norm, eps)
        inner = _gelu(states @ matrices["up"] + layer.up.bias)
        return normalise(states + inner @ matrices["down"] + layer.down.bias, layer.output_norm, eps)

    def _attend(self, qkv: FloatArray) -> FloatArray:
        """qkv: (tokens, 3 * hidden) of one text. Returns (tokens, hidden)."""
        tokens, heads = len(qkv), self._shape.heads
        query, key, value = qkv.reshape(tokens, 3, heads, -1).transpose(1, 2, 0, 3)  # each (heads, tokens, head size)
        weights = query @ key.transpose(0, 2, 1) * np.float32(1.0 / np.sqrt(key.shape[-1]))
        np.exp(weights - weights.max(-1, keepdims=True), out=weights)
        weights /= weights.sum(-1, keepdims=True)
        return (weights @ value).transpose(1, 0, 2).reshape(tokens, -1)


def choose_layers(layers: Sequence[LayerWeights], shape: EncoderShape) -> Layers:
    """The native layers where this machine has them and they agree with the plain ones, else the plain ones."""
    from moderation.native_layers import NativeLayers, why_not_native

    reason = why_not_native(shape)
    if reason is None:
        error = _check_error(
            NativeLayers(layers[:CHECK_LAYERS], shape), PlainLayers(layers[:CHECK_LAYERS], shape), shape
        )
        if error <= LARGEST_ERROR:
            return NativeLayers(layers, shape)
        reason = f"they are off by {error:.2g}"
        logger.warning("encoder_native available=no reason=%s", reason.replace(" ", "_"))
    return PlainLayers(layers, shape)


def _check_error(ones: Layers, others: Layers, shape: EncoderShape) -> float:
    """Relative, of the states of two texts in one batch."""
    states = np.random.default_rng(0).standard_normal((CHECK_TOKENS, shape.hidden)).astype(np.float32)
    expected = others(states, [3, CHECK_TOKENS])
    error = float(np.linalg.norm(ones(states, [3, CHECK_TOKENS]) - expected) / np.linalg.norm(expected))
    return error if error == error else float("inf")


def normalise(states: npt.NDArray[np.floating], norm: tuple[FloatArray, FloatArray], eps: float) -> FloatArray:
    weight, bias = norm
    centred = states - states.mean(-1, keepdims=True)
    variance = np.einsum("td,td->t", centred, centred)[:, None] / np.float32(states.shape[-1])
    return (centred / np.sqrt(variance + np.float32(eps)) * weight + bias).astype(np.float32, copy=False)


def _gelu(x: FloatArray) -> FloatArray:
    """The tanh form, as in training."""
    inner = np.float32(GELU_SLOPE) * (x + np.float32(0.044715) * (x * x * x))
    return np.float32(0.5) * x * (np.float32(1.0) + np.tanh(inner))


def read_layer(tensors: Tensors, prefix: str, shape: EncoderShape) -> LayerWeights:
    """Raises KeyError (missing) or ValueError (shape)."""

    def matrix(name: str, outs: int, ins: int) -> Matrix:
        codes = cast("npt.NDArray[np.int8]", expect(tensors[f"{prefix}{name}.codes"], (outs, ins)))
        scales = as_floats(tensors[f"{prefix}{name}.scales"], (outs,))
        return Matrix(codes, scales, as_floats(tensors[f"{prefix}{name}.bias"], (outs,)))

    hidden, inner = shape.hidden, shape.inner
    return LayerWeights(
        qkv=matrix("qkv", 3 * hidden, hidden),
        out=matrix("out", hidden, hidden),
        attention_norm=read_norm(tensors, f"{prefix}attention_norm", hidden),
        up=matrix("up", inner, hidden),
        down=matrix("down", hidden, inner),
        output_norm=read_norm(tensors, f"{prefix}output_norm", hidden),
    )


def read_norm(tensors: Tensors, name: str, size: int) -> tuple[FloatArray, FloatArray]:
    return as_floats(tensors[f"{name}.weight"], (size,)), as_floats(tensors[f"{name}.bias"], (size,))


def as_floats(tensor: npt.NDArray[np.generic], shape: tuple[int, ...]) -> FloatArray:
    values = expect(tensor, shape).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("a value is not finite")
    return values


def expect(tensor: npt.NDArray[np.generic], shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
    if tensor.shape != shape:
        raise ValueError(f"shape {tensor.shape}, expected {shape}")
    return tensor
