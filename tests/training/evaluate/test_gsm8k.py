"""The final number, however it is written."""

from __future__ import annotations

from decimal import Decimal

import pytest

from training.evaluate.gsm8k import final_number, is_correct

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("16 - 3 - 4 = 9\n#### 18", "18"),
        ("The answer is 18.", "18"),
        ("The answer is: **$1,234.50** for 2 days", "1234.5"),
        ("So she makes $18 every day.", "18"),
        ("It is \\boxed{-7}, not 8", "-7"),
        ("The answer is 3. No: the answer is 4, of 10.", "4"),
        ("-$5 is left", "-5"),
        ("half, or .5", "0.5"),
    ],
)
def test_the_final_number(text: str, number: str) -> None:
    assert final_number(text) == Decimal(number)


def test_a_text_without_a_number_is_wrong() -> None:
    assert final_number("None at all.") is None
    assert not is_correct("None at all.", "#### 18")


def test_numbers_are_compared_as_numbers() -> None:
    assert is_correct("That is $18.00.", "9 * 2 = 18\n#### 18")
    assert not is_correct("That is 180.", "9 * 2 = 18\n#### 18")
    assert not is_correct("18 eggs, so she makes 32 dollars", "9 * 2 = 18\n#### 18")
