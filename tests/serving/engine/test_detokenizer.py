"""Text leaves the detokenizer in whole characters, and a stop string never leaks its beginning."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engine.detokenizer import Detokenizer

pytestmark = pytest.mark.unit

BYTES = [bytes([i]) for i in range(256)]  # the hardest tokenizer: one byte a token


def feed(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(BYTES, stop)
    deltas: list[str] = []
    for byte in text.encode():
        deltas.append(detokenizer.feed(byte))
        if detokenizer.is_stopped:
            break
    deltas.append(detokenizer.finish())
    return deltas, detokenizer


@given(st.text())
def test_joined_deltas_are_the_text(text: str) -> None:
    deltas, _ = feed(text)
    assert "".join(deltas) == text


def test_no_delta_ends_inside_a_character() -> None:
    deltas, _ = feed("né 你好 👩‍👩‍👧")
    assert not any("�" in delta for delta in deltas)


@given(
    st.text(alphabet="abcé", max_size=30),
    st.lists(st.text(alphabet="abcé", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    deltas, detokenizer = feed(text, tuple(stops))
    shown = "".join(deltas)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    found = any(stop in text for stop in stops)
    assert detokenizer.is_stopped == found
    if not found:
        assert shown == text


def test_first_half_of_a_stop_string_is_held_back_until_it_is_decided() -> None:
    detokenizer = Detokenizer(BYTES, ("END",))
    shown = [detokenizer.feed(byte) for byte in b"an EN"]
    assert "".join(shown) == "an "
    assert detokenizer.feed(ord("X")) == "ENX"
    assert [detokenizer.feed(byte) for byte in b"END"] == ["", "", ""]
    assert detokenizer.is_stopped
    assert detokenizer.finish() == ""


def test_an_unfinished_character_at_the_end_becomes_a_replacement_character() -> None:
    detokenizer = Detokenizer(BYTES)
    assert detokenizer.feed("é".encode()[0]) == ""
    assert detokenizer.finish() == "�"


def test_the_space_that_sentencepiece_puts_first_is_dropped_once() -> None:
    detokenizer = Detokenizer([b" Hello", b" there"], strips_leading_space=True)
    assert [detokenizer.feed(i) for i in (0, 1, 0)] == ["Hello", " there", " Hello"]
