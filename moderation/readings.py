"""The forms in which a text is judged: itself with disguises folded, then what decodes in it, in its place.

Decodes base64, base32, hexadecimal, binary, percent, HTML and backslash escapes, rot13, text written backwards or
upside down, and hidden tag characters; one code inside another too. Ordinary text has one reading.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import html
import re
from collections.abc import Callable, Container, Iterator, Sequence

from moderation.english import english_share, is_word
from moderation.unmask import CJK, fold_characters, unmask

__all__ = ["MAX_READINGS", "readings"]

MAX_READINGS = 7
# Codes inside one another.
MAX_DEPTH = 3

ESCAPE = re.compile(
    r"(?:%[0-9A-Fa-f]{2})+|&(?:#\d{1,40}|#[xX][0-9A-Fa-f]{1,40}|[A-Za-z]\w{1,30});"
    r"|\\u\{[0-9A-Fa-f]{1,6}\}|\\u[0-9A-Fa-f]{4}|\\U[0-9A-Fa-f]{8}|\\x[0-9A-Fa-f]{2}"
)
# Encoded text hardly ever looks like a word.
BASE64 = re.compile(r"(?<![\w+/-])(?![A-Z]?[a-z]+(?![\w+/=-]))[\w+/-]{6,}(?:[ \t]?\r?\n[\w+/-]{8,})*={0,3}", re.ASCII)
BASE32 = re.compile(r"(?<!\w)[A-Z2-7]{16,}={0,6}")
HEX = re.compile(r"(?<!\w)(?:(?:0x)?[0-9A-Fa-f]{2}[ \t,:;-]{0,2}){4,}(?!\w)")
BINARY = re.compile(r"(?<!\w)(?:[01]{8}[ \t,]?){3,}(?!\w)")
NOT_HEX = re.compile(r"0x|[^0-9A-Fa-f]")
NOT_BINARY = re.compile("[^01]")
LETTER = re.compile(r"[^\W\d_]")
CJK_LETTER = re.compile(f"[{CJK}]")
MIN_PLAIN_CHARS = 3
# Random bytes are that many printable letters with a chance of less than one in a million.
MIN_UNKNOWN_CHARS = 12

WORD = re.compile(r"[A-Za-z]+")
MENTIONS_CIPHER = re.compile(
    r"\b(?:rot-?13|caesar|cipher|cypher|decipher|decode|decrypt|unscramble)|解码|解密|凯撒|密文", re.I
)
MENTIONS_REVERSAL = re.compile(r"\b(?:revers|backward)|反过来|倒过来|倒着|倒序|反转|逆序|反着", re.I)
CHINESE_BORDER = re.compile('[:\uff1a\u3002\uff0c,\n\u201c\u201d"]')
MIN_CODED_WORDS = 2
MAX_PLAIN_BETWEEN = 2
MIN_ENGLISH = 0.6

RIGHT_TO_LEFT = re.compile("\u202e([^\u202c\u202d\u2066-\u2069\n]*)[\u202c\u202d\u2069]?")
TAGS = re.compile("[\U000e0020-\U000e007e]+")
TAG_BASE = 0xE0000
UPSIDE_DOWN = str.maketrans("ɐɔǝɟƃɓᵷɥᴉɾʞꞁɯɹʇʌʍʎbdnpqu", "acefggghijklmrtvwyqpudbn")
TURNED = re.compile("[ɐɔǝɟɥᴉɾʞɯɹʇʌʍʎ]")
LETTERS = re.compile(r"[^\W\d_]+")


def readings(text: str) -> list[str]:
    """1 to MAX_READINGS texts, the unmasked one first; each at most four times as long as `text`.

    All codes are undone in one reading, so that harmless codes beside a harmful one cannot crowd it out. The framing
    stays around them there, and is left out of a second one, where it cannot make harmless what it frames. What reads
    backwards has readings of its own.
    """
    decoded = text
    for _ in range(MAX_DEPTH):
        before = decoded
        for decode in (_decode_hidden, _decode_escapes, _decode_runs, _decode_rot13):
            decoded = decode(decoded)
        if decoded == before:
            break
    forms = dict.fromkeys([text, decoded, _changed_part(text, decoded), *_reversals(decoded)])
    return list(dict.fromkeys(map(unmask, forms)))


def _changed_part(before: str, after: str) -> str:
    """`after` from the first word that differs to the last; all of it if nothing does."""
    if before == after:
        return after
    start = _common_start(before, after)
    stop = len(after) - _common_start(before[start:][::-1], after[start:][::-1])
    while start > 0 and _is_ascii_word(after[start - 1]):
        start -= 1
    while stop < len(after) and _is_ascii_word(after[stop]):
        stop += 1
    return after[start:stop]


def _common_start(first: str, second: str) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(second)))


def _is_ascii_word(character: str) -> bool:
    return character.isascii() and character.isalnum()


def _decode_hidden(text: str) -> str:
    """Tag characters, which are shown nowhere, and text turned around by a right-to-left override."""
    text = TAGS.sub(lambda match: "".join(chr(ord(c) - TAG_BASE) for c in match[0]), text)
    return RIGHT_TO_LEFT.sub(lambda match: match[1][::-1], text)


def _decode_escapes(text: str) -> str:
    return ESCAPE.sub(_unescape, text)


def _unescape(match: re.Match[str]) -> str:
    escape = match[0]
    if escape[0] == "&":
        return html.unescape(escape)
    if escape[0] == "%":
        return bytes.fromhex(escape.replace("%", "")).decode("utf-8", "replace")
    point = int(escape[2:].strip("{}"), 16)
    return chr(point) if point < 0x110000 else escape


def _decode_runs(text: str) -> str:
    folded = fold_characters(text)
    decoded = BINARY.sub(lambda match: _plain_or_same(match[0], _binary_bytes), folded)
    decoded = HEX.sub(lambda match: _plain_or_same(match[0], _hex_bytes), decoded)
    decoded = BASE32.sub(lambda match: _plain_or_same(match[0], _base32_bytes), decoded)
    decoded = BASE64.sub(_decode_base64, decoded)
    return text if decoded == folded else decoded


def _decode_base64(match: re.Match[str]) -> str:
    run = match[0]
    plain = _plain_or_same(run, _base64_bytes)
    if plain == run and "\n" in run:
        return "\n".join(_plain_or_same(line, _base64_bytes) for line in run.split("\n"))
    return plain


def _binary_bytes(run: str) -> bytes:
    bits = NOT_BINARY.sub("", run)
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits) - 7, 8))


def _hex_bytes(run: str) -> bytes:
    digits = NOT_HEX.sub("", run)
    return bytes.fromhex(digits[: len(digits) // 2 * 2])


def _base32_bytes(run: str) -> bytes:
    digits = run.rstrip("=")
    return base64.b32decode(digits + "=" * (-len(digits) % 8))


def _base64_bytes(run: str) -> bytes:
    digits = "".join(run.split()).rstrip("=").replace("-", "+").replace("_", "/")
    # One digit alone holds no byte.
    digits = digits[:-1] if len(digits) % 4 == 1 else digits
    return base64.b64decode(digits + "=" * (-len(digits) % 4))


def _plain_or_same(run: str, decode: Callable[[str], bytes]) -> str:
    """What the run decodes to if that is text, else the run."""
    try:
        # UTF-16 of Latin letters is ASCII with zero bytes between.
        plain = decode(run).replace(b"\0", b"").decode("utf-8")
    except (binascii.Error, UnicodeDecodeError):
        return run
    spaces = " " if run[-1:].isspace() else ""
    return plain + spaces if _is_text(plain) else run


def _is_text(plain: str) -> bool:
    if len(plain) < MIN_PLAIN_CHARS and not CJK_LETTER.search(plain):
        return False
    printable = sum(c.isprintable() or c.isspace() for c in plain)
    letters = len(LETTER.findall(plain))
    if printable < 0.95 * len(plain) or letters < 0.5 * len(plain):
        return False
    is_chinese = len(CJK_LETTER.findall(plain)) > max(1, 0.3 * letters)
    return len(plain) >= MIN_UNKNOWN_CHARS or is_chinese or english_share(plain) >= MIN_ENGLISH


def _decode_rot13(text: str) -> str:
    return _replace_coded(text, _rot13, _rot13, MENTIONS_CIPHER)


def _reversals(text: str) -> Iterator[str]:
    """The text with what reads backwards turned around: as a whole, and word by word."""
    folded = fold_characters(LETTERS.sub(_turn, text) if TURNED.search(text) else text)
    turned = _replace_coded(folded, _reverse, _reverse, MENTIONS_REVERSAL)
    if turned != folded:
        by_word = _replace_coded(folded, _reverse, _reverse_words, MENTIONS_REVERSAL)
        yield from (turned, _changed_part(folded, turned), by_word, _changed_part(folded, by_word))
    elif CJK_LETTER.search(folded) and MENTIONS_REVERSAL.search(folded):
        parts = [part for part in CHINESE_BORDER.split(folded) if not MENTIONS_REVERSAL.search(part)]
        yield _reverse(folded)
        yield "".join(map(_reverse, parts))


def _turn(match: re.Match[str]) -> str:
    return match[0].translate(UPSIDE_DOWN) if TURNED.search(match[0]) else match[0]


def _replace_coded(
    text: str, decode_word: Callable[[str], str], decode: Callable[[str], str], mention: re.Pattern[str]
) -> str:
    """`decode` applied to stretches whose words are English only after `decode_word`; single words need a mention."""
    words = set(WORD.findall(text.lower()))
    coded = {word for word in words if not is_word(word) and is_word(decode_word(word))}
    if not coded:
        return text
    min_words = 1 if mention.search(text) else MIN_CODED_WORDS
    pieces: list[str] = []
    end = 0
    for words in _coded_stretches(text, coded, decode_word):
        start, stop = words[0].start(), words[-1].end()
        part = text[start:stop]
        if len(words) < min_words or english_share(decode(part)) < max(MIN_ENGLISH, english_share(part) + 0.1):
            continue
        pieces += [text[end:start], decode(part)]
        end = stop
    return "".join([*pieces, text[end:]])


def _coded_stretches(
    text: str, coded: Container[str], decode_word: Callable[[str], str]
) -> Iterator[Sequence[re.Match[str]]]:
    """From a coded word to the last one with few plain words between, and the short coded words beside them."""
    words = list(WORD.finditer(text))
    borders: list[list[int]] = []
    for i, match in enumerate(words):
        if match[0].lower() not in coded:
            continue
        if borders and i - borders[-1][1] <= MAX_PLAIN_BETWEEN + 1:
            borders[-1][1] = i
        else:
            borders.append([i, i])
    free_from = 0
    for first, last in borders:
        while first > free_from and _is_short_code(words[first - 1][0], decode_word):
            first -= 1
        while last + 1 < len(words) and _is_short_code(words[last + 1][0], decode_word):
            last += 1
        # A stretch that grew over the next one's beginning holds it.
        if first >= free_from:
            yield words[first : last + 1]
            free_from = last + 1


def _is_short_code(word: str, decode_word: Callable[[str], str]) -> bool:
    lowered = word.lower()
    return len(word) < 3 and not is_word(lowered, 1) and is_word(decode_word(lowered), 1)


def _rot13(text: str) -> str:
    return codecs.encode(text, "rot13")


def _reverse(text: str) -> str:
    return text[::-1]


def _reverse_words(text: str) -> str:
    return WORD.sub(lambda word: word[0][::-1], text)
