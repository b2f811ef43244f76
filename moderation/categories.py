"""OpenAI's moderation categories, by their exact names on the wire, and the mapping that every verdict carries."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

__all__ = ["Category", "complete_flags", "complete_scores"]


class Category(StrEnum):
    HARASSMENT = "harassment"
    HARASSMENT_THREATENING = "harassment/threatening"
    HATE = "hate"
    HATE_THREATENING = "hate/threatening"
    ILLICIT = "illicit"
    ILLICIT_VIOLENT = "illicit/violent"
    SELF_HARM = "self-harm"
    SELF_HARM_INTENT = "self-harm/intent"
    SELF_HARM_INSTRUCTIONS = "self-harm/instructions"
    SEXUAL = "sexual"
    SEXUAL_MINORS = "sexual/minors"
    VIOLENCE = "violence"
    VIOLENCE_GRAPHIC = "violence/graphic"


def complete_scores(scores: Mapping[Category, float]) -> dict[str, float]:
    """Every category in OpenAI's order; 0.0 for those that nothing was trained for."""
    return {category.value: float(scores.get(category, 0.0)) for category in Category}


def complete_flags(flags: Mapping[Category, bool]) -> dict[str, bool]:
    """Every category in OpenAI's order; false for those that nothing was trained for."""
    return {category.value: bool(flags.get(category, False)) for category in Category}
