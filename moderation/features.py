"""Text to hashed n-gram features: tokens, word n-grams and character n-grams of the unmasked text. Pure, numpy only.

Chinese, Japanese and Korean characters are tokens of their own, so the word n-grams over them are character n-grams.
Training and inference both call `hash_features`; a change here needs new weights and a new format name.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moderation.errors import ModerationError
from moderation.unmask import CJK, unmask

__all__ = ["CJK", "FeatureOptions", "Features", "hash_features", "normalise", "split_tokens"]

UInt64Array = npt.NDArray[np.uint64]

TOKEN = re.compile(rf"[{CJK}]|[^\W_{CJK}]+|[!?]")
APOSTROPHE = re.compile(r"(?<=[^\W\d_])['\u2019](?=[^\W\d_])")
COMBINING = re.compile("[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff]+")
DIGIT = re.compile(r"\d")

WIDE_MARKS = str.maketrans("\uff01\uff1f", "!?")

# Every CJK token sorts after every alphabetic one that matters here, so one comparison tells them apart.
CJK_FROM = "\u3040"

# Odd 64-bit constants: the first multiplies code points within a token, the others tell the kinds of n-gram apart.
POLYNOMIAL = 0x9E3779B97F4A7C15
WORD_SALTS = (0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5)
CHAR_SALT = 0xD6E8FEB86659FD93
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


@dataclass(frozen=True, slots=True)
class FeatureOptions:
    """What is counted and how it is scaled. Kept in the weights' config.json; both sides must agree."""

    bucket_bits: int = 20
    max_word_order: int = 3
    char_orders: tuple[int, ...] = (3, 4, 5)
    word_smoothing: float = 6.0
    char_smoothing: float = 20.0
    char_share: float = 0.7

    def __post_init__(self) -> None:
        if not 8 <= self.bucket_bits <= 24:
            raise ModerationError(f"bucket_bits is {self.bucket_bits}; it must be from 8 to 24")
        if not 1 <= self.max_word_order <= len(WORD_SALTS):
            raise ModerationError(f"max_word_order is {self.max_word_order}; it must be from 1 to {len(WORD_SALTS)}")


@dataclass(frozen=True, slots=True)
class Features:
    """indices: (n,) int64 buckets; values: (n,) float32, the weight of each. A bucket may occur twice."""

    indices: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]


def normalise(text: str) -> str:
    """`unmask`, and then what only counting wants: lower case, no accents or apostrophes, every digit a 0."""
    folded = unmask(text).lower()
    if not folded.isascii():
        folded = unicodedata.normalize("NFC", COMBINING.sub("", unicodedata.normalize("NFD", folded)))
        folded = folded.translate(WIDE_MARKS)
    return DIGIT.sub("0", APOSTROPHE.sub("", folded))


def split_tokens(normalised: str) -> list[str]:
    """Words and numbers, single CJK characters, and the marks ! and ?; everything else separates."""
    return TOKEN.findall(normalised)


def hash_features(text: str, options: FeatureOptions) -> Features:
    """Distinct n-grams of one text as buckets, each kind scaled by 1 / sqrt(its count + smoothing)."""
    tokens = split_tokens(normalise(text))
    if not tokens:
        return Features(np.empty(0, np.int64), np.empty(0, np.float32))
    words = _distinct(_word_ngrams(tokens, options.max_word_order), options.bucket_bits)
    chars = _distinct(_char_ngrams(tokens, options.char_orders), options.bucket_bits)
    values = np.empty(len(words) + len(chars), np.float32)
    values[: len(words)] = 1.0 / np.sqrt(len(words) + options.word_smoothing)
    values[len(words) :] = options.char_share / np.sqrt(len(chars) + options.char_smoothing)
    return Features(np.concatenate([words, chars]), values)


def _word_ngrams(tokens: Sequence[str], max_order: int) -> UInt64Array:
    """Hashes of all runs of 1 to max_order tokens."""
    ids = _hash_tokens(tokens)
    hashes = [ids * np.uint64(WORD_SALTS[0])]
    for order in range(2, max_order + 1):
        if len(ids) < order:
            break
        run = np.zeros(len(ids) - order + 1, np.uint64)
        for offset in range(order):
            run = _mix(run + ids[offset : len(ids) - order + 1 + offset])
        hashes.append(run * np.uint64(WORD_SALTS[order - 1]))
    return np.concatenate(hashes)


def _hash_tokens(tokens: Sequence[str]) -> UInt64Array:
    """One hash a token: a polynomial in its code points, modulo 2**64."""
    lengths = np.fromiter((len(token) for token in tokens), np.int64, len(tokens))
    starts = np.cumsum(lengths) - lengths
    places = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
    powers = np.cumprod(np.full(int(lengths.max()), POLYNOMIAL, np.uint64), dtype=np.uint64)
    terms = _mix(_code_points("".join(tokens))) * powers[places]
    return _mix(np.add.reduceat(terms, starts, dtype=np.uint64))


def _char_ngrams(tokens: Sequence[str], orders: Sequence[int]) -> UInt64Array:
    """Hashes of the character n-grams inside and across words, single spaces between tokens; CJK has none here."""
    points = _mix(_code_points(f" {' '.join(token for token in tokens if token < CJK_FROM)} "))
    hashes: list[UInt64Array] = []
    for order in orders:
        if len(points) < order:
            continue
        run = np.full(len(points) - order + 1, CHAR_SALT + order, np.uint64)
        for offset in range(order):
            run = run * np.uint64(POLYNOMIAL) + points[offset : len(points) - order + 1 + offset]
        hashes.append(run)
    return np.concatenate(hashes) if hashes else np.empty(0, np.uint64)


def _code_points(text: str) -> UInt64Array:
    # Lone surrogates are legal in a Python string and reach us from JSON escapes.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)


def _distinct(hashes: UInt64Array, bucket_bits: int) -> npt.NDArray[np.int64]:
    return np.unique(_mix(hashes) >> np.uint64(64 - bucket_bits)).astype(np.int64)


def _mix(values: UInt64Array) -> UInt64Array:
    """The finaliser of splitmix64: spreads every input bit over all output bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(MIX_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(MIX_2)
    return values ^ (values >> np.uint64(31))
