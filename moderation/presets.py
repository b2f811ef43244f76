"""Named strictness levels and the languages that have thresholds of their own. A leaf: strings only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, get_args

from moderation.features import CJK

__all__ = ["DEFAULT_PRESET", "LANGUAGES", "PRESETS", "Language", "PresetName", "Thresholds", "language_of"]

PresetName = Literal["strict", "balanced", "lenient"]
Language = Literal["en", "zh"]
# Probability from which on a text is flagged, chosen at training time for a stated false-positive rate.
Thresholds = Mapping[PresetName, Mapping[Language, float]]

PRESETS: tuple[PresetName, ...] = get_args(PresetName)
LANGUAGES: tuple[Language, ...] = get_args(Language)
DEFAULT_PRESET: PresetName = "balanced"

CJK_CHARACTER = re.compile(f"[{CJK}]")
MOSTLY = 0.3


def language_of(text: str) -> Language:
    """`zh` where more than 30 % of the characters are Chinese, Japanese or Korean; a name for a threshold, no more."""
    return "zh" if len(CJK_CHARACTER.findall(text)) > MOSTLY * len(text) else "en"
