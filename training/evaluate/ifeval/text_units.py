"""Words, sentences and paragraphs of an answer, as IFEval's instructions count them. Pure functions on text.

IFEval uses NLTK's tokenizers. Words are the same `\\w+` runs; sentences and capital words are split by the rules below,
which need no trained model and differ from NLTK's on rare abbreviations and clitics only.
"""

from __future__ import annotations

import re

__all__ = ["capital_words", "count_sentences", "count_words", "starred_paragraphs"]

_WORD = re.compile(r"\w+")
# A word with inner marks counts once: "U.S.A", "WELL-KNOWN", "DON'T".
_TOKEN = re.compile(r"\w+(?:[.'’&-]\w+)*")
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)|[。！？…]+[”’」』）]*")
_ABBREVIATIONS = frozenset(
    ("mr", "mrs", "ms", "dr", "prof", "sr", "jr", "st", "vs", "e.g", "i.e", "inc", "ltd", "co", "fig", "al", "approx")
)
_LAST_WORD = re.compile(r"([\w.]+)$")


def count_words(text: str) -> int:
    return len(_WORD.findall(text))


def capital_words(text: str) -> list[str]:
    """Words of capital letters only; "I" and "A" are such words, "1984" is not."""
    return [word for word in _TOKEN.findall(text) if word.isupper()]


def count_sentences(text: str) -> int:
    """A sentence ends at . ! ? before white space, or at a Chinese full stop; what is left at the end counts too."""
    count, start = 0, 0
    for found in _SENTENCE_END.finditer(text):
        if found.group().startswith(".") and _is_abbreviation(text[start : found.start()], text[found.end() :]):
            continue
        if _WORD.search(text, start, found.start()):
            count += 1
        start = found.end()
    return count + (1 if _WORD.search(text, start) else 0)


def _is_abbreviation(before: str, after: str) -> bool:
    word = _LAST_WORD.search(before)
    if word is None:
        return False
    goes_on_small = after.lstrip()[:1].islower()
    is_initial = len(word[1]) == 1 and word[1].isupper() and word[1] != "I"
    is_list_number = word[1].isdigit() and before[: word.start()].rpartition("\n")[2].strip() == ""
    return word[1].lower() in _ABBREVIATIONS or is_initial or is_list_number or goes_on_small


def starred_paragraphs(text: str) -> list[str] | None:
    """What the divider `***` separates; None if an inner one is empty. An empty first or last one is not counted."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    inner = parts[1:-1]
    if any(not part.strip() for part in inner):
        return None
    return [part for part in parts if part.strip()]
