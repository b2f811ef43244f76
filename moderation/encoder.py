"""The small transformer that reads a text: token ids to logits in numpy, one thread, no torch.

`moderation.network` is the same network as a torch module, which trains it; a test compares the two. Matrices are
stored as 8-bit codes with one scale a row, the word embeddings as 4-bit codes with one scale for 32 values (which is
how their source ships them), so that the whole stays small enough to live in the repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from moderation.errors import ModerationError, WeightsError
from moderation.unmask import unmask
from moderation.weight_files import (
    CONFIG_FILE,
    CURE,
    TENSORS_FILE,
    Tensors,
    read_checked,
    read_config,
    read_tensors,
)

__all__ = [
    "ENCODER_FORMAT",
    "TOKENIZER_FILE",
    "Encoder",
    "EncoderConfig",
    "EncoderShape",
    "pack_embeddings",
    "pack_matrix",
]

FloatArray = npt.NDArray[np.float32]

ENCODER_FORMAT = "causerie-encoder-1"
TOKENIZER_FILE = "tokenizer.json"
FIRST_TOKEN, LAST_TOKEN = 0, 2
EMBEDDING_GROUP = 32
# Longer runs are cut; the policy's windows are shorter than this.
MAX_TOKENS = 128
# Texts of one batch share the products; past this the activations leave the cache and nothing is won.
BATCH_TOKENS = 512
GELU_SLOPE = 0.7978845608028654  # sqrt(2 / pi)


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
class EncoderConfig:
    """config.json of an encoder directory. `outputs` names the logits, the first is "harmful"."""

    version: str
    shape: EncoderShape
    outputs: tuple[str, ...]
    weights_sha256: str
    tokenizer_sha256: str
    format: str = ENCODER_FORMAT


@dataclass(frozen=True, slots=True)
class _Layer:
    """Matrices are (in, out) float32, ready for `states @ matrix`."""

    qkv: FloatArray
    qkv_bias: FloatArray
    out: FloatArray
    out_bias: FloatArray
    attention_norm: tuple[FloatArray, FloatArray]
    up: FloatArray
    up_bias: FloatArray
    down: FloatArray
    down_bias: FloatArray
    output_norm: tuple[FloatArray, FloatArray]


class Encoder:
    """Holds only constants after construction, so threads may share it."""

    def __init__(self, config: EncoderConfig, tensors: Tensors, tokenizer: Tokenizer) -> None:
        """tensors: as `moderation.train_encoder` stores them. Raises KeyError (missing) or ValueError (shape)."""
        shape = config.shape
        self.config = config
        self._tokenizer = tokenizer
        self._word_codes = cast(
            "npt.NDArray[np.uint8]", _expect(tensors["words.codes"], (shape.vocab, shape.hidden // 2))
        )
        self._word_scales = _expect(tensors["words.scales"], (shape.vocab, shape.hidden // EMBEDDING_GROUP))
        self._places = _float(tensors["places"], (shape.positions, shape.hidden))
        self._norm = _norm(tensors, "norm", shape.hidden)
        self._layers = [_layer(tensors, f"layers.{index}.", shape) for index in range(shape.layers)]
        self._pool = _float(tensors["pool.weight"], (shape.hidden,))
        self._head = _float(tensors["head.weight"], (len(config.outputs), 2 * shape.hidden)).T.copy()
        self._head_bias = _float(tensors["head.bias"], (len(config.outputs),))

    @classmethod
    def load(cls, directory: Path) -> Encoder:
        """Reads and checks an encoder directory. Raises WeightsError."""
        config = read_config(directory / CONFIG_FILE, EncoderConfig, ENCODER_FORMAT)
        tensors = read_tensors(directory / TENSORS_FILE, config.weights_sha256)
        tokenizer = _read_tokenizer(directory / TOKENIZER_FILE, config)
        try:
            return cls(config, tensors, tokenizer)
        except (KeyError, ValueError) as error:
            raise WeightsError(directory / TENSORS_FILE, f"tensors unusable ({error})", CURE) from None

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.config.outputs

    def tokenize(self, text: str) -> list[int]:
        """At most MAX_TOKENS ids, the first and last of them the markers that the trunk was trained with."""
        # Lone surrogates are legal in a Python string and no UTF-8.
        clean = unmask(text).encode("utf-8", "replace").decode("utf-8")
        return [FIRST_TOKEN, *self._tokenizer.encode(clean, add_special_tokens=False).ids[: MAX_TOKENS - 2], LAST_TOKEN]

    def logits(self, texts: Sequence[str]) -> FloatArray:
        """(texts, outputs) float32. Each row is what the text alone would give, up to rounding."""
        ids = [self.tokenize(text) for text in texts]
        found = np.empty((len(ids), len(self.config.outputs)), np.float32)
        for batch in _batches([len(row) for row in ids]):
            found[batch] = self.forward([ids[index] for index in batch])
        return found

    def forward(self, rows: Sequence[Sequence[int]]) -> FloatArray:
        """Logits of token ids, (rows, outputs). All rows' tokens lie in one matrix; attention keeps to its own row."""
        ends = np.cumsum([len(row) for row in rows])
        spans = [slice(int(end) - len(row), int(end)) for row, end in zip(rows, ends, strict=True)]
        states = self._embed(np.concatenate([np.asarray(row, np.int64) for row in rows]), spans)
        for layer in self._layers:
            states = self._apply(layer, states, spans)
        pooled = np.stack([self._pooled(states[span]) for span in spans])
        return pooled @ self._head + self._head_bias

    def _embed(self, ids: npt.NDArray[np.int64], spans: Sequence[slice]) -> FloatArray:
        codes = self._word_codes[ids]
        values = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(ids), -1, EMBEDDING_GROUP).astype(np.float32)
        words = (values - 8.0) * self._word_scales[ids].astype(np.float32)[:, :, None]
        places = np.concatenate([self._places[: span.stop - span.start] for span in spans])
        return _normalise(words.reshape(len(ids), -1) + places, self._norm, self.config.shape.eps)

    def _apply(self, layer: _Layer, states: FloatArray, spans: Sequence[slice]) -> FloatArray:
        eps = self.config.shape.eps
        qkv = states @ layer.qkv + layer.qkv_bias
        mixed = np.concatenate([self._attend(qkv[span]) for span in spans])
        states = _normalise(states + mixed @ layer.out + layer.out_bias, layer.attention_norm, eps)
        inner = _gelu(states @ layer.up + layer.up_bias)
        return _normalise(states + inner @ layer.down + layer.down_bias, layer.output_norm, eps)

    def _attend(self, qkv: FloatArray) -> FloatArray:
        """qkv: (tokens, 3 * hidden) of one text. Returns (tokens, hidden)."""
        tokens, heads = len(qkv), self.config.shape.heads
        query, key, value = qkv.reshape(tokens, 3, heads, -1).transpose(1, 2, 0, 3)  # each (heads, tokens, head size)
        weights = query @ key.transpose(0, 2, 1) * np.float32(1.0 / np.sqrt(key.shape[-1]))
        np.exp(weights - weights.max(-1, keepdims=True), out=weights)
        weights /= weights.sum(-1, keepdims=True)
        return (weights @ value).transpose(1, 0, 2).reshape(tokens, -1)

    def _pooled(self, states: FloatArray) -> FloatArray:
        """The mean over tokens and their learnt weighting: (2 * hidden,)."""
        focus = states @ self._pool
        focus = np.exp(focus - focus.max())
        return np.concatenate([states.mean(0), focus @ states / focus.sum()])


def pack_embeddings(values: FloatArray) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16]]:
    """(vocab, hidden) to 4-bit codes, two to a byte with the lower one first, and scales (vocab, hidden / 32) float16.

    Values that lie on such a grid already (16 levels, the scale the largest magnitude / 8) come back exactly.
    """
    groups = values.reshape(len(values), -1, EMBEDDING_GROUP)
    peak = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)
    scales = (peak / -8.0).astype(np.float16)
    steps = np.where(scales == 0, 1, scales).astype(np.float32)
    codes = np.clip(np.rint(groups / steps) + 8, 0, 15).astype(np.uint8).reshape(len(values), -1, 2)
    return (codes[..., 0] | codes[..., 1] << 4).astype(np.uint8), scales[..., 0]


def pack_matrix(values: FloatArray) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """(out, in) to 8-bit codes and one float32 scale a row, (out,)."""
    scales = np.maximum(np.abs(values).max(1), np.float32(1e-12)) / np.float32(127.0)
    return np.rint(values / scales[:, None]).astype(np.int8), scales.astype(np.float32)


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of texts that are computed together, short ones with short ones."""
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not batches or lengths[index] > room:
            batches.append([])
            room = BATCH_TOKENS
        batches[-1].append(index)
        room -= lengths[index]
    return batches


def _normalise(states: npt.NDArray[np.floating], norm: tuple[FloatArray, FloatArray], eps: float) -> FloatArray:
    weight, bias = norm
    centred = states - states.mean(-1, keepdims=True)
    variance = np.einsum("td,td->t", centred, centred)[:, None] / np.float32(states.shape[-1])
    return (centred / np.sqrt(variance + np.float32(eps)) * weight + bias).astype(np.float32, copy=False)


def _gelu(x: FloatArray) -> FloatArray:
    """The tanh form, as in training."""
    inner = np.float32(GELU_SLOPE) * (x + np.float32(0.044715) * (x * x * x))
    return np.float32(0.5) * x * (np.float32(1.0) + np.tanh(inner))


def _layer(tensors: Tensors, prefix: str, shape: EncoderShape) -> _Layer:
    def matrix(name: str, outs: int, ins: int) -> FloatArray:
        codes = _expect(tensors[f"{prefix}{name}.codes"], (outs, ins)).astype(np.float32)
        return (codes * _float(tensors[f"{prefix}{name}.scales"], (outs,))[:, None]).T.copy()

    def bias(name: str, size: int) -> FloatArray:
        return _float(tensors[f"{prefix}{name}.bias"], (size,))

    hidden, inner = shape.hidden, shape.inner
    return _Layer(
        qkv=matrix("qkv", 3 * hidden, hidden),
        qkv_bias=bias("qkv", 3 * hidden),
        out=matrix("out", hidden, hidden),
        out_bias=bias("out", hidden),
        attention_norm=_norm(tensors, f"{prefix}attention_norm", hidden),
        up=matrix("up", inner, hidden),
        up_bias=bias("up", inner),
        down=matrix("down", hidden, inner),
        down_bias=bias("down", hidden),
        output_norm=_norm(tensors, f"{prefix}output_norm", hidden),
    )


def _norm(tensors: Tensors, name: str, size: int) -> tuple[FloatArray, FloatArray]:
    return _float(tensors[f"{name}.weight"], (size,)), _float(tensors[f"{name}.bias"], (size,))


def _float(tensor: npt.NDArray[np.generic], shape: tuple[int, ...]) -> FloatArray:
    values = _expect(tensor, shape).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("a value is not finite")
    return values


def _expect(tensor: npt.NDArray[np.generic], shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
    if tensor.shape != shape:
        raise ValueError(f"shape {tensor.shape}, expected {shape}")
    return tensor


def _read_tokenizer(path: Path, config: EncoderConfig) -> Tokenizer:
    content = read_checked(path, config.tokenizer_sha256)
    try:
        tokenizer = Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise WeightsError(path, f"not a tokenizer ({error})", CURE) from None
    if tokenizer.get_vocab_size() != config.shape.vocab:
        raise WeightsError(path, f"{tokenizer.get_vocab_size()} tokens, expected {config.shape.vocab}", CURE)
    return tokenizer
