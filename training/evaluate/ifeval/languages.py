"""Which language an answer is in: by its script, and by common words where languages share one.

IFEval asks the `langdetect` library. That would be a dependency for one check, is random unless seeded, and knows no
more than n-grams; here a language with a script of its own is told by the script, and the others by the share of their
commonest words. Like IFEval, a text that nothing can be said about passes (`could_be`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["KNOWN_LANGUAGES", "could_be", "detect"]

# Most letters must come from the script: names and code in Latin letters are normal in any language.
_MOST = 0.5
_MIN_LETTERS = 10

_SCRIPTS: Mapping[str, str] = {
    "arabic": r"؀-ۿݐ-ݿﭐ-﷿ﹰ-﻿",
    "cyrillic": r"Ѐ-ӿ",
    "devanagari": r"ऀ-ॿ",
    "gurmukhi": r"਀-੿",
    "gujarati": r"઀-૿",
    "bengali": r"ঀ-৿",
    "tamil": r"஀-௿",
    "telugu": r"ఀ-౿",
    "kannada": r"ಀ-೿",
    "malayalam": r"ഀ-ൿ",
    "thai": r"฀-๿",
    "hangul": r"가-힯ᄀ-ᇿ",
    "kana": r"぀-ヿ",
    "han": r"一-鿿㐀-䶿",
    "greek": r"Ͱ-Ͽ",
    "hebrew": r"֐-׿",
    "latin": r"A-Za-zÀ-ɏḀ-ỿ",
}
_COUNTERS = {name: re.compile(f"[{characters}]") for name, characters in _SCRIPTS.items()}
_ONE_LANGUAGE: Mapping[str, str] = {
    "gurmukhi": "pa",
    "gujarati": "gu",
    "bengali": "bn",
    "tamil": "ta",
    "telugu": "te",
    "kannada": "kn",
    "malayalam": "ml",
    "thai": "th",
    "hangul": "ko",
    "kana": "ja",
    "han": "zh",
    "greek": "el",
    "hebrew": "he",
}
_COMMON_WORDS: Mapping[str, Mapping[str, str]] = {
    "latin": {
        "en": "the of and to in is that it for was with as on are this be by have not you at or from they we how my",
        "de": "der die das und ist nicht ein eine zu mit den von sich auf für im dem ich sie es auch wir wie oder",
        "es": "el la de que y los en un una por con no para es su las del se lo como más pero este",
        "fr": "le la les de des et est un une que dans pour qui en du pas il elle nous vous avec sur ce au plus",
        "it": "il di che e la un una per è non con sono del della le gli si come più nel anche ma questo",
        "pt": "o de que e a do da em um uma para é com não os se na no por mais as dos como mas você seu",
        "nl": "de het een en van is dat niet op te zijn voor met die aan er ook als maar bij naar wij",
        "fi": "ja on ei se että hän oli ovat mutta kun niin myös tai joka kuin voi olla sen sitä minun tämä",
        "sw": "ya na wa kwa ni za katika la kama hii yake huu pia au lakini kuwa hiyo sana watu wake",
        "vi": "và của là có không cho được một những người với trong các này tôi để bạn đã khi từ",
        "id": "yang dan di untuk dengan ini itu dari adalah tidak dalam akan pada atau juga saya anda",
        "tr": "ve bir bu için ile çok da de olarak gibi daha ne ama olan var değil",
        "sv": "och att det som en är på av för den med till inte om ett jag har han de",
    },
    "cyrillic": {
        "ru": "и в не на что я с он как это по но они к у из за мы для то так же от быть чтобы если или",
        "bg": "и в не на да се е с за от че по са като но ще си това при или до към ги тя той",
        "uk": "і в не на що я з це як він до та за але у ми для від й так про чи",
    },
    "devanagari": {
        "hi": "है के में की का और से को हैं यह एक पर नहीं कि भी लिए हो ने तो कर था इस मैं",
        "mr": "आहे आणि च्या मी या हे एक नाही तो ते करा साठी होते आहेत मध्ये पण तुम्ही माझ्या असे केले काय",
        "ne": "छ र को मा हो यो गर्न एक पनि लागि छन् भने तपाईं थियो हुन्छ गर्नुहोस् म हाम्रो बाट गर्ने",
    },
    "arabic": {
        "ar": "في من على أن إلى هذا هذه التي الذي لا ما كان هو هي مع عن كل ثم أو لم قد",
        "fa": "و در به از که این را با است برای آن یک تا می های خود بود من شد هم اما ما",
        "ur": "کے میں کی ہے اور سے کا کو ہیں یہ ایک نے پر نہیں ہو اس کہ بھی لیے تھا",
    },
}
_WORDS = {
    script: {language: frozenset(words.split()) for language, words in languages.items()}
    for script, languages in _COMMON_WORDS.items()
}
KNOWN_LANGUAGES = frozenset(_ONE_LANGUAGE.values()) | {name for words in _WORDS.values() for name in words}
# \w stops at Indic vowel signs, so a word is what lies between white space and punctuation.
_TOKEN = re.compile(r"[^\s.,;:!?\"'“”‘’()\[\]{}<>*_|/\\।،؟؛-]+")


def detect(text: str) -> str | None:
    """ISO 639-1 code of the language, or None where too little text or no known word tells."""
    counts = {name: len(counter.findall(text)) for name, counter in _COUNTERS.items()}
    letters = sum(counts.values())
    if letters < _MIN_LETTERS:
        return None
    # Japanese mixes kana with Chinese characters; Chinese has no kana.
    if counts["kana"] > 0.1 * letters and counts["kana"] + counts["han"] > _MOST * letters:
        return "ja"
    script = max(counts, key=lambda name: counts[name])
    if counts[script] <= _MOST * letters:
        return None
    return _ONE_LANGUAGE.get(script) or _by_common_words(text, script)


def could_be(text: str, language: str) -> bool:
    """True if `text` is detected as `language`, or nothing can be said about it."""
    found = detect(text)
    return found is None or found == language.partition("-")[0]


def _by_common_words(text: str, script: str) -> str | None:
    tokens = _TOKEN.findall(text.lower())
    shares = {
        language: sum(token in words for token in tokens) / max(1, len(tokens))
        for language, words in _WORDS[script].items()
    }
    best = max(shares, key=lambda language: shares[language])
    return best if shares[best] > 0 else None
