"""Strict and loose readings of one answer."""

from __future__ import annotations

import pytest

from training.evaluate.ifeval.accuracy import Instruction, check_answer, loose_variants

pytestmark = pytest.mark.unit


def test_the_loose_reading_forgives_an_introduction_and_asterisks() -> None:
    no_comma = Instruction("punctuation:no_comma", {})
    quoted = Instruction("startend:quotation", {})
    checked = check_answer('Sure, here it is:\n*"quoted text"*', [no_comma, quoted])
    assert checked.strict == (False, False)
    assert checked.loose == (True, True)


def test_the_loose_reading_does_not_forgive_the_answer_itself() -> None:
    checked = check_answer("Sure:\none, two\nBye.", [Instruction("punctuation:no_comma", {})])
    assert checked.loose == (False,)


def test_the_answer_itself_is_one_of_the_eight_readings() -> None:
    variants = loose_variants("a\n*b*\nc")
    assert variants == ["a\n*b*\nc", "*b*\nc", "a\n*b*", "*b*", "a\nb\nc", "b\nc", "a\nb", "b"]


def test_an_answer_cut_down_to_nothing_follows_nothing() -> None:
    assert check_answer("one, line", [Instruction("punctuation:no_comma", {})]).loose == (False,)
