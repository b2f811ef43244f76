"""Folds disguised writing back: look-alike letters, invisible characters, leetspeak, letters set apart. Pure.

Ordinary text comes out as it went in: case, digits, punctuation, code, addresses and names such as GPT4 stay.
Text with CaSE nOiSe becomes small. What only the n-grams want (no capitals, no accents) is `moderation.features`' step.
Every step is linear in the text's length.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import islice, pairwise, product

from moderation.english import cut_into_words, is_word
from moderation.lookalikes import ALWAYS_LATIN, LEET, LOOKALIKES, ONLY_AMONG_LATIN, STRICT_LOOKALIKES

__all__ = ["CJK", "fold_characters", "unmask"]

# Folding one disguise can lay bare another one; texts found in practice settle after one or two passes.
MAX_PASSES = 4

# Kana, Han with extension A, Hangul, compatibility Han, and the Han extensions beyond the basic plane.
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f"

INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\u2800\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff9-\uffff\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]+"
)
# Compatibility folding would change the sense or the look of these and uncovers no letter.
KEPT_WIDTH = (
    "\u00a8\u00aa\u00af\u00b2-\u00b4\u00b8-\u00ba\u00bc-\u00be\u2010-\u2015\u2026\u2070\u2074-\u2079\u2080-\u2089\u2103"
    "\u2122\u3000-\u303f\u3200-\u33ff\ufdf0-\ufdff\uff01\uff05\uff08\uff09\uff0c\uff1a\uff1b\uff1f\uff5e"
)
FOLDABLE_WIDTH = re.compile(f"[^{KEPT_WIDTH}]+")
GENERIC_MARKS = "\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"
GENERIC_MARK = re.compile(f"[{GENERIC_MARKS}]+")
MARKED_WORD = re.compile(rf"[\w{GENERIC_MARKS}]+")
# Sets within the basic plane are looked up in a table, others are searched: hence two of each.
ODD_LATIN = re.compile(f"[{''.join(chr(point) for point in ALWAYS_LATIN if point < 0x10000)}]")
ENCLOSED_LATIN = re.compile("[\U0001f110-\U0001f189]")
ASTRAL = re.compile("[\U00010000-\U0001efff]")
REGIONAL_RUN = re.compile("[\U0001f1e6-\U0001f1ff]+")
REGIONAL_A = 0x1F1E6

FOREIGN = re.compile("[\u0370-\u03ff\u0400-\u052f\u0530-\u058f\u13a0-\u13ff\u2c80-\u2cff\ua4d0-\ua4ff\uab70-\uabbf]")
ALPHABETIC_WORD = re.compile(rf"[^\W\d_{CJK}]+")
WHOLE_WORD = frozenset(map(chr, LOOKALIKES)) - ONLY_AMONG_LATIN
MIN_MIXTURE = 4
LATIN_LETTER = re.compile("[A-Za-z]")

# Between single letters: up to three characters that are no letter or digit.
GAP = r"[\W_]{1,3}"
MASKED_LETTER = r"[A-Za-z0-9@$!]"
SET_APART = re.compile(rf"(?<![\w@$!]){MASKED_LETTER}(?:{GAP}{MASKED_LETTER}(?![^\W_]|[@$])){{2,}}")
SINGLE = re.compile(rf"({GAP})")
CHINESE_APART = re.compile(rf"(?<![{CJK}])[{CJK}](?:{GAP}[{CJK}](?![{CJK}])){{2,}}")
QUOTE = re.compile(r"['\"\u2018-\u201f\u3008-\u3011\uff08\uff09()\[\]]")
CHINESE_POINT = re.compile("[\u3001\u3002\uff0c\uff1a\uff1b\uff01\uff1f]")
NOT_WORD = re.compile(r"[\W_]+")
MIN_ENUMERATION = 8
CUT_LETTERS = 200
SPELLED_SHARE = 0.6

LEET_SIGNS = re.escape("".join(sign for sign in LEET if sign not in "!|+"))
LEET_LETTER = f"[A-Za-z{LEET_SIGNS}]"
# The look-behind lets a token begin only at its first character, so that no stretch of letters is read twice.
LEET_TOKEN = re.compile(
    rf"(?<!{LEET_LETTER})([A-Za-z]*(?:[{LEET_SIGNS}]|[!|+](?={LEET_LETTER}))(?:{LEET_LETTER}|[!|+](?={LEET_LETTER}))*)"
)
HAS_ADDRESS = re.compile(r"://|www\.|@[\w-]+\.")
ADDRESS_OR_LEET = re.compile(
    rf"(?:https?://|www\.)\S+|(?<![\w.+-])[\w.+-]{{1,64}}@[\w-]{{1,64}}\.\w\S*|{LEET_TOKEN.pattern}"
)
HAS_LEET = re.compile(f"[{LEET_SIGNS}!|+]")
JOINER = re.compile(r"([!|+])")
LEADING_SIGNS = re.compile(f"[{LEET_SIGNS}!|+]+")
SPELLED_LIKE_A_WORD = re.compile(r"[A-Z]?[a-z]+(?:[013457@$]{1,2}[a-z]+)+[013457]?")
UNITS = frozenset({"am", "pm", "in", "all", "old", "ft", "he", "en", "an", "it", "on", "id"})
IN_CODE = frozenset("_./\\=([{<>#-&%:`~^*")
MAX_LEET_CHARS = 24
MAX_LEET_TRIES = 64
MIN_UNKNOWN_CHARS = 6

THREE_ALIKE = re.compile(r"([^\W\d_])\1{2,}", re.IGNORECASE)
THREE_SAME = re.compile(r"([^\W\d_])\1\1")
LETTER_RUN = re.compile(r"[^\W_]+")
# Neither all small, nor all capital, nor a capital at the beginning only.
ODD_CASE = re.compile(r"[a-z][A-Z]|[A-Z]{2}[a-z]")
LATIN_WORD = re.compile(r"[A-Za-z]{3,}")
MIN_ODD_WORDS = 3
ODD_SHARE = 0.55
ROMAN = re.compile(r"[IVXLCDM]{1,9}|[ivxlc]{1,9}")
MAX_RUNS = 4


def _combining_marks(start: int, end: int) -> str:
    points = [point for point in range(start, end) if unicodedata.combining(chr(point))]
    ranges: list[list[int]] = []
    for point in points:
        if ranges and point == ranges[-1][1] + 1:
            ranges[-1][1] = point
        else:
            ranges.append([point, point])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


# No script needs four marks on one letter. Longer piles also make Unicode normalisation quadratic.
PILE = re.compile(f"[{_combining_marks(0x300, 0x10000)}{GENERIC_MARKS}]{{4,}}")
ASTRAL_PILE = re.compile(f"[{_combining_marks(0x10000, 0x1E950)}]{{4,}}")


def unmask(text: str) -> str:
    """`text` with disguises folded; at most four times as long. `unmask(unmask(text)) == unmask(text)`."""
    for _ in range(MAX_PASSES):
        folded = _fold_once(text)
        if folded == text:
            break
        text = folded
    return text


def _fold_once(text: str) -> str:
    text = fold_characters(text)
    if not text.isascii():
        text = _fold_lookalikes(_fold_marks(text))
        text = CHINESE_APART.sub(_close_chinese, text)
    text = SET_APART.sub(_close_up, text)
    if HAS_LEET.search(text):
        tokens = ADDRESS_OR_LEET if HAS_ADDRESS.search(text) else LEET_TOKEN
        text = tokens.sub(_read_leet, text)
    if THREE_SAME.search(text.lower()):
        text = LETTER_RUN.sub(_shorten_runs, text)
    return text.lower() if _has_case_noise(text) else text


def fold_characters(text: str) -> str:
    """What needs no look at words: invisible characters go; wide, enclosed and oddly shaped Latin letters become plain.

    NFKC, but for punctuation and signs. What is encoded in the text (base64) decodes as before.
    """
    text = INVISIBLE.sub("", text)
    if text.isascii():
        return text
    text = PILE.sub("", text)
    if ASTRAL.search(text):
        text = ASTRAL_PILE.sub("", text)
    if ODD_LATIN.search(text) or ENCLOSED_LATIN.search(text):
        text = text.translate(ALWAYS_LATIN)
    text = REGIONAL_RUN.sub(_fold_regional, text)
    if unicodedata.is_normalized("NFKC", text):
        return text
    return FOLDABLE_WIDTH.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)


def _fold_regional(match: re.Match[str]) -> str:
    # Two of them are a flag.
    return match[0] if len(match[0]) == 2 else "".join(chr(ord(c) - REGIONAL_A + ord("A")) for c in match[0])


def _fold_marks(text: str) -> str:
    """Bares the words that carry a mark which no ordinary accented letter accounts for."""
    if not GENERIC_MARK.search(text):
        return text
    return MARKED_WORD.sub(_bare, text)


def _bare(match: re.Match[str]) -> str:
    if not GENERIC_MARK.search(match[0]):
        return match[0]
    return unicodedata.normalize("NFC", GENERIC_MARK.sub("", unicodedata.normalize("NFD", match[0])))


def _fold_lookalikes(text: str) -> str:
    """Latin letters for look-alikes in words that mix scripts, and in whole words of look-alikes beside Latin ones.

    A text of look-alikes only is folded when all its letters are the very drawing of a Latin one.
    """
    if not FOREIGN.search(text):
        return text
    matches = list(ALPHABETIC_WORD.finditer(text))
    words = [match[0] for match in matches]
    is_latin = [LATIN_LETTER.search(word) is not None for word in words]
    is_foreign = [not word.isascii() and FOREIGN.search(word) is not None for word in words]
    is_whole = [foreign and WHOLE_WORD.issuperset(word) for word, foreign in zip(words, is_foreign, strict=True)]
    only_drawings = sum(map(len, words)) >= MIN_MIXTURE and all(STRICT_LOOKALIKES.issuperset(word) for word in words)
    pieces: list[str] = []
    end = 0
    for i, match in enumerate(matches):
        beside_latin = (i > 0 and is_latin[i - 1]) or (i + 1 < len(words) and is_latin[i + 1])
        folded = words[i]
        if is_foreign[i] and (is_latin[i] or (is_whole[i] and (beside_latin or only_drawings))):
            folded = words[i].translate(LOOKALIKES)
            # Short mixtures are formulae and units: "kΩ", "Δx".
            if len(folded) < MIN_MIXTURE and not is_word(folded.lower(), 1):
                folded = words[i]
            # The next word of look-alikes now stands beside a Latin one.
            is_latin[i] = is_latin[i] or folded != words[i]
        pieces += [text[end : match.start()], folded]
        end = match.end()
    return "".join([*pieces, text[end:]])


def _close_chinese(match: re.Match[str]) -> str:
    characters = NOT_WORD.sub("", match[0])
    # Few single characters with points, quotes or various signs between them are enumerations.
    if len(characters) < MIN_ENUMERATION:
        gaps = NOT_WORD.findall(match[0])
        if len(set(gaps)) > 1 or QUOTE.search(gaps[0]) or CHINESE_POINT.search(gaps[0]):
            return match[0]
    return characters


def _close_up(match: re.Match[str]) -> str:
    """Joins letters that stand apart where they spell words; the commonest gap is inside words, others between them."""
    letters = SINGLE.split(match[0])
    gaps = letters[1::2]
    inner_gap = Counter(gaps).most_common(1)[0][0]
    if QUOTE.search(inner_gap):
        return match[0]
    borders = [i for i, gap in enumerate(gaps) if gap != inner_gap]
    groups = ["".join(letters[2 * a : 2 * b : 2]) for a, b in pairwise([0, *(i + 1 for i in borders), len(gaps) + 1])]
    words = [_spell(group) for group in groups]
    if not any(words):
        return match[0]
    # "m y" beside a spelled word is a word too.
    chosen = [word or (g if len(g) <= 2 else inner_gap.join(g)) for word, g in zip(words, groups, strict=True)]
    return chosen[0] + "".join(gaps[i] + word for i, word in zip(borders, chosen[1:], strict=True))


def _spell(group: str) -> str | None:
    """The words that single letters spell, or None if they look like anything else: initials, a formula, a, b, c."""
    if len(group) < 3:
        return None
    if not group.isalpha():
        return _leet_word(group)
    pieces = [
        piece for start in range(0, len(group), CUT_LETTERS) for piece in _cut(group[start : start + CUT_LETTERS])
    ]
    known = sum(len(piece) for piece in pieces if is_word(piece.lower()))
    return " ".join(pieces) if known >= SPELLED_SHARE * len(group) else None


def _cut(letters: str) -> Sequence[str]:
    return cut_into_words(letters) if len(set(letters)) > 2 else [letters]


def _read_leet(match: re.Match[str]) -> str:
    token = match[1]
    if token is None or token.isdigit():
        return match[0]
    if folded := _leet_word(token):
        return folded
    if JOINER.search(token):
        return "".join(_leet_word(piece) or piece for piece in JOINER.split(token))
    if _stands_in_code(match) or len(token) < MIN_UNKNOWN_CHARS or not SPELLED_LIKE_A_WORD.fullmatch(token):
        return token
    # An unknown word may lend a letter or two to disguise; "root@server" lends none.
    return token if "@" in token and min(map(len, token.split("@"))) > 2 else _first_choice(token)


def _leet_word(token: str) -> str | None:
    """The English word that `token` is a disguise of."""
    if not 3 <= len(token) <= MAX_LEET_CHARS or not LATIN_LETTER.search(token):
        return None
    core = token.lower()
    if 2 * sum(map(core.count, "0123456789")) > len(core):
        # "4x3", "1e6"
        return None
    leading = LEADING_SIGNS.match(core)
    if leading and LATIN_LETTER.search(core) and not HAS_LEET.search(core, leading.end()):
        # "5am", "$table", "100percent": a number or a sign before a word of its own.
        rest = core[leading.end() :]
        if len(leading[0]) > 1 or rest in UNITS or is_word(rest):
            return None
    stem = core.rstrip("0123456789")
    if stem != core and stem.isalpha() and stem.isascii() and (is_word(stem) or len(core) - len(stem) > 1):
        # "level5", "sha256"
        return None
    choices = [LEET.get(c, c) for c in core]
    for tried in islice(product(*choices), MAX_LEET_TRIES):
        if is_word(word := "".join(tried)):
            return _with_case_of(token, word)
    return None


def _first_choice(token: str) -> str:
    return _with_case_of(token, "".join(LEET.get(c, c)[0] for c in token.lower().replace("11", "ll")))


def _with_case_of(token: str, word: str) -> str:
    letters = [c for c in token if c.isalpha()]
    if len(letters) > 1 and all(c.isupper() for c in letters):
        return word.upper()
    return "".join(c if c.isalpha() and c.isascii() else plain for c, plain in zip(token, word, strict=True))


def _stands_in_code(match: re.Match[str]) -> bool:
    text = match.string
    before = text[match.start() - 1] if match.start() else " "
    after = text[match.end() : match.end() + 2]
    # A full stop ends a sentence; one with a letter behind it does not.
    return before in IN_CODE or (after[:1] in IN_CODE and not (after[:1] in ".:-*" and not after[1:].isalnum()))


def _has_case_noise(text: str) -> bool:
    """Whether most words change between cases inside; code and names do so now and then (getName, iPhone, LaTeX)."""
    words = LATIN_WORD.findall(text)
    odd = sum(ODD_CASE.search(word) is not None for word in words)
    return odd >= MIN_ODD_WORDS and odd > ODD_SHARE * len(words)


def _shorten_runs(match: re.Match[str]) -> str:
    word = match[0]
    if not THREE_ALIKE.search(word) or any(c.isdigit() for c in word) or _is_meant(match):
        return word
    shortened = THREE_ALIKE.sub(lambda run: run[0][:2], word)
    runs = list(THREE_ALIKE.finditer(word))
    if not word.isascii() or len(runs) > MAX_RUNS or is_word(shortened.lower()):
        return shortened
    ends = [0, *(run.end() for run in runs)]
    between = [word[end : run.start()] for end, run in zip(ends, runs, strict=False)]
    choices = [(before + run[0][:2], before + run[0][:1]) for before, run in zip(between, runs, strict=True)]
    for tried in product(*choices):
        if is_word((candidate := "".join(tried) + word[ends[-1] :]).lower()):
            return candidate
    return shortened


def _is_meant(match: re.Match[str]) -> bool:
    """www, AAA, XIII, #ffffff"""
    word = match[0]
    is_one_letter = len(set(word)) == 1 and len(word) <= MAX_RUNS
    return is_one_letter or ROMAN.fullmatch(word) is not None or match.string[match.start() - 1 : match.start()] == "#"
