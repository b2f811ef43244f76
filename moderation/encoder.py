"""The small transformer that reads a text: token ids to logits on one thread, without torch.

`moderation.network` is the same network as a torch module, which trains it; a test compares the two. Matrices are
stored as 8-bit codes with one scale a row, the word embeddings as 4-bit codes with one scale for 32 values (which is
how their source ships them), so that the whole stays small enough to live in the repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from moderation.encoder_layers import (
    EMBEDDING_GROUP,
    MAX_TOKENS,
    EncoderShape,
    FloatArray,
    as_floats,
    choose_layers,
    expect,
    normalise,
    read_layer,
    read_norm,
)
from moderation.errors import WeightsError
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

ENCODER_FORMAT = "causerie-encoder-1"
TOKENIZER_FILE = "tokenizer.json"
FIRST_TOKEN, LAST_TOKEN = 0, 2
# Texts of one batch share the products; past this the activations leave the cache and nothing is won.
BATCH_TOKENS = 512


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """config.json of an encoder directory. `outputs` names the logits, the first is "harmful"."""

    version: str
    shape: EncoderShape
    outputs: tuple[str, ...]
    weights_sha256: str
    tokenizer_sha256: str
    format: str = ENCODER_FORMAT


class Encoder:
    """Holds only constants after construction, so threads may share it."""

    def __init__(self, config: EncoderConfig, tensors: Tensors, tokenizer: Tokenizer) -> None:
        """tensors: as `moderation.train_encoder` stores them. Raises KeyError (missing) or ValueError (shape)."""
        shape = config.shape
        self.config = config
        self._tokenizer = tokenizer
        self._word_codes = cast(
            "npt.NDArray[np.uint8]", expect(tensors["words.codes"], (shape.vocab, shape.hidden // 2))
        )
        self._word_scales = expect(tensors["words.scales"], (shape.vocab, shape.hidden // EMBEDDING_GROUP))
        self._places = as_floats(tensors["places"], (shape.positions, shape.hidden))
        self._norm = read_norm(tensors, "norm", shape.hidden)
        self._layers = choose_layers([read_layer(tensors, f"layers.{i}.", shape) for i in range(shape.layers)], shape)
        self._pool = as_floats(tensors["pool.weight"], (shape.hidden,))
        self._head = as_floats(tensors["head.weight"], (len(config.outputs), 2 * shape.hidden)).T.copy()
        self._head_bias = as_floats(tensors["head.bias"], (len(config.outputs),))

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
        ends = list(accumulate(len(row) for row in rows))
        spans = [slice(end - len(row), end) for row, end in zip(rows, ends, strict=True)]
        states = self._layers(self._embed(np.concatenate([np.asarray(row, np.int64) for row in rows]), spans), ends)
        pooled = np.stack([self._pooled(states[span]) for span in spans])
        return pooled @ self._head + self._head_bias

    def _embed(self, ids: npt.NDArray[np.int64], spans: Sequence[slice]) -> FloatArray:
        codes = self._word_codes[ids]
        values = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(ids), -1, EMBEDDING_GROUP).astype(np.float32)
        words = (values - 8.0) * self._word_scales[ids].astype(np.float32)[:, :, None]
        places = np.concatenate([self._places[: span.stop - span.start] for span in spans])
        return normalise(words.reshape(len(ids), -1) + places, self._norm, self.config.shape.eps)

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


def _read_tokenizer(path: Path, config: EncoderConfig) -> Tokenizer:
    content = read_checked(path, config.tokenizer_sha256)
    try:
        tokenizer = Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise WeightsError(path, f"not a tokenizer ({error})", CURE) from None
    if tokenizer.get_vocab_size() != config.shape.vocab:
        raise WeightsError(path, f"{tokenizer.get_vocab_size()} tokens, expected {config.shape.vocab}", CURE)
    return tokenizer
