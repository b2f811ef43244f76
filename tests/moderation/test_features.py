from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moderation.errors import ModerationError
from moderation.features import (
    CHAR_SALT,
    MIX_1,
    MIX_2,
    POLYNOMIAL,
    WORD_SALTS,
    FeatureOptions,
    hash_features,
    normalise,
    split_tokens,
)

pytestmark = pytest.mark.unit

MASK = (1 << 64) - 1


def plain_mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * MIX_1) & MASK
    value = ((value ^ (value >> 27)) * MIX_2) & MASK
    return value ^ (value >> 31)


def plain_features(text: str, options: FeatureOptions) -> dict[int, float]:
    """The twin of hash_features: one n-gram at a time, Python integers, no array."""
    tokens = split_tokens(normalise(text))

    def token_id(token: str) -> int:
        total = 0
        for place, letter in enumerate(token):
            total += plain_mix(ord(letter)) * pow(POLYNOMIAL, place + 1, 1 << 64)
        return plain_mix(total & MASK)

    words: set[int] = set()
    for order in range(1, options.max_word_order + 1):
        for start in range(len(tokens) - order + 1):
            ids = [token_id(token) for token in tokens[start : start + order]]
            run = ids[0]
            if order > 1:
                run = 0
                for token in ids:
                    run = plain_mix((run + token) & MASK)
            words.add(plain_mix((run * WORD_SALTS[order - 1]) & MASK) >> (64 - options.bucket_bits))

    latin = f" {' '.join(token for token in tokens if token[0] < chr(0x3040))} "
    chars: set[int] = set()
    for order in options.char_orders:
        for start in range(len(latin) - order + 1):
            run = CHAR_SALT + order
            for letter in latin[start : start + order]:
                run = (run * POLYNOMIAL + plain_mix(ord(letter))) & MASK
            chars.add(plain_mix(run) >> (64 - options.bucket_bits))

    total: dict[int, float] = {}
    if tokens:
        for bucket in words:
            total[bucket] = total.get(bucket, 0.0) + 1.0 / math.sqrt(len(words) + options.word_smoothing)
        for bucket in chars:
            share = options.char_share / math.sqrt(len(chars) + options.char_smoothing)
            total[bucket] = total.get(bucket, 0.0) + share
    return total


def added_up(text: str, options: FeatureOptions) -> dict[int, float]:
    features = hash_features(text, options)
    total: dict[int, float] = {}
    for bucket, value in zip(features.indices.tolist(), features.values.tolist(), strict=True):
        total[bucket] = total.get(bucket, 0.0) + value
    return total


TEXTS = st.text(alphabet=st.sampled_from("aab klzÄ0149 !?'$@\u200bж你杀软件　.\n-"), max_size=60)


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.integers(1, 3), st.sampled_from([8, 16, 20]))
def test_arrays_and_plain_integers_find_the_same_features(text: str, max_word_order: int, bucket_bits: int) -> None:
    options = FeatureOptions(bucket_bits=bucket_bits, max_word_order=max_word_order)

    assert added_up(text, options) == pytest.approx(plain_features(text, options), rel=1e-5)


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("KILL", "kill"),
        ("ｋｉｌｌ ｙｏｕ", "kill you"),
        ("k\u200bi\u200dl\u2060l", "kill"),
        ("k1ll th3m", "kill them"),
        ("ki11er5", "killers"),
        ("a$$hole", "asshole"),
        ("b@stard", "bastard"),
        ("k i l l them", "kill them"),
        ("k.i.l.l them", "kill them"),
        ("kіll", "kill"),  # a Cyrillic letter among Latin ones
        ("ë̸v̸i̸l̸", "evil"),
        ("soooooo", "soo"),
        ("don't don’t", "dont dont"),
        ("2024", "0000"),
        ("杀毒！", "杀毒!"),
    ],
)
def test_disguises_are_folded_away(written: str, plain: str) -> None:
    folded = normalise(written)

    assert folded == plain or split_tokens(folded) == split_tokens(normalise(plain))


def test_cyrillic_words_stay_cyrillic() -> None:
    assert normalise("Как дела") == "как дела"


def test_each_chinese_character_is_a_token() -> None:
    assert split_tokens("我用python写代码") == ["我", "用", "python", "写", "代", "码"]


@pytest.mark.parametrize(
    "text", ["", " \n\t", "\u200b", "...", "\ud800", "\ud800 a \udfff", "\u202e\u202d", "\x00\x01"]
)
def test_any_string_has_finite_features(text: str) -> None:
    features = hash_features(text, FeatureOptions())

    assert len(features.indices) == len(features.values)
    assert np.isfinite(features.values).all()


def test_buckets_stay_inside_the_table() -> None:
    options = FeatureOptions(bucket_bits=8)

    indices = hash_features("the quick brown fox 狐狸 jumps over the lazy dog", options).indices

    assert indices.min() >= 0
    assert indices.max() < 256


@pytest.mark.parametrize("options", [{"bucket_bits": 40}, {"max_word_order": 0}, {"max_word_order": 9}])
def test_impossible_options_are_refused_with_the_allowed_range(options: dict[str, int]) -> None:
    with pytest.raises(ModerationError, match=r"must be from \d+ to \d+"):
        FeatureOptions(**options)  # pyright: ignore[reportArgumentType]
