"""What English words look like: a list of common ones, and letters without spaces cut into them.

`moderation.unmask` asks whether a folded disguise is a word; `moderation.readings` whether a decoding is English. The
list holds 9,500 words of the training texts and phrases, the most frequent first; no test file had a part in it.
"""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path

__all__ = ["cut_into_words", "english_share", "is_word"]

WORD = re.compile(r"[a-z]+")
SHORT_WORDS = "a i of to in is it be as at so we he by or on do if me my up an go no us am"
LONGEST_WORD = 18
# An unknown letter costs more than any known word's letters do, so unknown stretches stay short.
UNKNOWN_LETTER_COST = 11.0


def is_word(word: str, min_letters: int = 3) -> bool:
    """`word`, in lower case, is in the list."""
    return len(word) >= min_letters and word in _costs()


def english_share(text: str) -> float:
    """Share of the letters of `text` that stand in common English words, 0 for a text without ASCII letters."""
    words = WORD.findall(text.lower())
    costs = _costs()
    return sum(len(word) for word in words if word in costs) / max(1, sum(map(len, words)))


def cut_into_words(letters: str) -> list[str]:
    """The likeliest words of a run of ASCII letters; letters that belong to none stand together as one piece.

    The cost is linear: the length times LONGEST_WORD.
    """
    costs, lowered = _costs(), letters.lower()
    best, start_of_last, is_known = [0.0], [0], [True]
    for end in range(1, len(letters) + 1):
        cost, start, known = best[end - 1] + UNKNOWN_LETTER_COST, end - 1, False
        for begin in range(max(0, end - LONGEST_WORD), end):
            word_cost = costs.get(lowered[begin:end])
            if word_cost is not None and best[begin] + word_cost < cost:
                cost, start, known = best[begin] + word_cost, begin, True
        best.append(cost)
        start_of_last.append(start)
        is_known.append(known)
    pieces: list[tuple[str, bool]] = []
    end = len(letters)
    while end:
        start = start_of_last[end]
        if pieces and not is_known[end] and not pieces[-1][1]:
            pieces[-1] = (letters[start:end] + pieces[-1][0], False)
        else:
            pieces.append((letters[start:end], is_known[end]))
        end = start
    return [piece for piece, _ in reversed(pieces)]


@cache
def _costs() -> dict[str, float]:
    """Minus the logarithm of each word's chance by Zipf's law, from its place in the list."""
    words = SHORT_WORDS.split() + (Path(__file__).parent / "data" / "words_en.txt").read_text("utf-8").split()
    scale = math.log(len(words))
    return {word: math.log((place + 1) * scale) for place, word in enumerate(words)}
