"""Sentences, words and paragraphs."""

from __future__ import annotations

import pytest

from training.evaluate.ifeval.text_units import capital_words, count_sentences, count_words, starred_paragraphs

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("...", 0),
        ("No end", 1),
        ("One. Two", 2),
        ("Really?! Yes.", 2),
        ('He said "Stop." Then he left.', 2),
        ("Version 3.5 is out. Try it.", 2),
        ("Mr. and Mrs. Smith, e.g. the old ones, came.", 1),
        ("J. R. R. Tolkien wrote it.", 1),
        ("1. First item.\n2. Second item.", 2),
        ("Wait... what? Yes!", 2),
        ("今天很好。我们走吧！", 2),
        ("A line\n\nwithout full stops", 1),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert count_sentences(text) == count


def test_words_are_runs_of_letters_and_digits() -> None:
    assert count_words("don't stop, 3 times!") == 5


def test_capital_words_need_letters() -> None:
    assert capital_words("I saw NASA's U.S.A. map in 1984, A-OK? Ok") == ["I", "U.S.A", "A-OK"]


def test_paragraphs_between_stars() -> None:
    assert starred_paragraphs("a\n\n***\n\nb") == ["a\n", "\nb"]
    assert starred_paragraphs("***\na\n***") == ["a"]
    assert starred_paragraphs("a *** *** b") is None
