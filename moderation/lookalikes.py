"""Tables of characters that pass for a Latin letter: data for `moderation.unmask`, which decides where they apply."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["ALWAYS_LATIN", "LEET", "LOOKALIKES", "ONLY_AMONG_LATIN", "STRICT_LOOKALIKES"]

A, SMALL_A = ord("A"), ord("a")

# Symbols and digits for letters, likeliest first. Applied only where a word of the list comes out.
LEET = {
    "0": "o", "1": "il", "3": "e", "4": "a", "5": "s", "6": "gb", "7": "t", "8": "b", "9": "g",
    "@": "a", "$": "s", "!": "il", "|": "li", "+": "t", "€": "e", "£": "l", "¢": "c", "¥": "y", "¡": "i",
    "ø": "o", "Ø": "o", "ß": "b", "đ": "d", "ħ": "h", "ł": "l", "Ł": "l", "ŧ": "t",
}  # fmt: skip

# Letters of other scripts, in the order of the Latin ones beside them.
PAIRS = (
    # Cyrillic that is the same drawing, then close, then near enough inside a word that is Latin otherwise.
    ("аеорсухіјѕԁӏһԛԝүАВЕЅІЈКМНОРСТХУӀԌԜԚ", "aeopcyxijsdlhqwyABESIJKMHOPCTXYIGWQ"),  # codespell:ignore
    ("вкмнт", "bkmht"),  # codespell:ignore
    ("гпиьбяшщзёєґқңұәғГПИЬБЯШЗЄЁ", "rnubbrwwzeerkhuefRNUBBRWZEE"),  # codespell:ignore
    ("αβγεηικνορςτυχωΑΒΕΖΗΙΚΜΝΟΡΤΥΧ", "abyenikvopctuxwABEZHIKMNOPTYX"),  # codespell:ignore
    ("δθλμπσΛΣΘΩ", "dolunoAEOO"),
    ("օսհոռցզյլքաՏԼՕՍ", "ouhnngqjlpwSLOU"),  # codespell:ignore
    ("ᎪᏴᏟᎠᎬᏀᎻᏆᎫᏦᏞᎷᏢᎡᏚᎢᏙᎳᏃᎩᎥᏟᏒᏔᏏᏧᏂ", "ABCDEGHIJKLMPRSTVWZYiCRWbdh"),
    ("ꓐꓑꓓꓔꓖꓗꓙꓚꓜꓝꓟꓠꓡꓢꓣꓦꓧꓪꓫꓬꓮꓰꓲꓳꓴ", "BPDTGKJCZFMNLSRVHWXYAEIOU"),
    ("ⲀⲂⲈⲒⲔⲘⲚⲞⲢⲤⲦⲨⲬⲁⲃⲉⲓⲕⲙⲛⲟⲣⲥⲧⲩⲭ", "ABEIKMNOPCTYXabeikmnopctyx"),
)
STRICT_LOOKALIKES = frozenset(PAIRS[0][0])
# Whole words of the others are words of their own language.
ONLY_AMONG_LATIN = frozenset(PAIRS[2][0] + PAIRS[4][0])
LOOKALIKES = {ord(theirs): latin for row, ours in PAIRS for theirs, latin in zip(row, ours, strict=True)}

# Blocks of Latin letters of odd shape; their names say which letter each one is: "LATIN SMALL LETTER K WITH HOOK".
LATIN_BLOCKS = ((0x180, 0x2B0), (0x1D00, 0x1DC0), (0x2C60, 0x2C80), (0xA720, 0xA800), (0xAB30, 0xAB70))
LATIN_NAME = re.compile(r"LATIN (SMALL LETTER|CAPITAL LETTER|LETTER SMALL CAPITAL) ([A-Z])(?: WITH .*)?")
# Circled, squared and parenthesised letters that compatibility folding leaves alone or spells with brackets.
ENCLOSED = ((0x1F150, A), (0x1F170, A), (0x1F110, A), (0x249C, SMALL_A))


def _odd_latin_letters() -> dict[int, str]:
    letters: dict[int, str] = {}
    for first, end in LATIN_BLOCKS:
        for point in range(first, end):
            match = LATIN_NAME.fullmatch(unicodedata.name(chr(point), ""))
            if match and not unicodedata.decomposition(chr(point)):
                letters[point] = match[2] if match[1] == "CAPITAL LETTER" else match[2].lower()
    return letters


def _enclosed_letters() -> dict[int, str]:
    return {first + place: chr(base + place) for first, base in ENCLOSED for place in range(26)}


ALWAYS_LATIN = _odd_latin_letters() | _enclosed_letters() | {ord("ı"): "i", ord("ɑ"): "a", ord("ɩ"): "i"}
