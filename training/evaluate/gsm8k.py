"""Whether an answer to a GSM8K problem ends in the right number. The reference ends in `#### number`."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

__all__ = ["final_number", "is_correct"]

_NUMBER = r"-?\$?-?(?:\d{1,3}(?:,\d{3})+|\d+)?\.?\d+"
_ANYWHERE = re.compile(_NUMBER)
# In order of trust: the data set's own mark, a boxed result, a sentence that says so.
_MARKED = (
    re.compile(rf"####\s*({_NUMBER})"),
    re.compile(rf"\\boxed\{{\s*({_NUMBER})"),
    re.compile(rf"answer\s*(?:is|are)?\s*[:=]?\s*\**\s*({_NUMBER})", re.IGNORECASE),
)


def final_number(text: str) -> Decimal | None:
    """The number that the text gives as its result: the last marked one, else the last of all."""
    for pattern in _MARKED:
        marked = pattern.findall(text)
        if marked:
            return _parse(marked[-1])
    found = _ANYWHERE.findall(text)
    return _parse(found[-1]) if found else None


def is_correct(answer: str, reference: str) -> bool:
    """Equal as numbers: 18, 18.0 and $18 are one answer."""
    expected = final_number(reference)
    return expected is not None and final_number(answer) == expected


def _parse(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None
