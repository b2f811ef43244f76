"""What each output of the encoder should say of a training row: 1, 0, or nothing where the row's source is silent.

The first output is the binary decision. The others are OpenAI's categories and "jailbreak"; a source that only says
"harmful" teaches none of them, and one that says "hate" leaves open whether the row also threatens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from moderation.categories import Category
from moderation.rows import Row

__all__ = ["EXTENSIONS", "OUTPUTS", "category_of", "rows_by_category", "targets_of"]

EXTENSIONS = ("jailbreak",)
OUTPUTS = ("harmful", *(category.value for category in Category), *EXTENSIONS)
UNKNOWN = math.nan

# Sources and their own category names, read as OpenAI's; what is missing here is unknown.
OF_SOURCE = {"cold": "hate", "vicomtech_stormfront": "hate"}
OF_NAME = {
    "hate": "hate",
    "offensive": "harassment",
    "harassment_bullying": "harassment",
    "Hate, harassment and discrimination": "hate",
    "chemical_biological": "illicit/violent",
    "Violence": "illicit/violent",
    "cybercrime_intrusion": "illicit",
    "illegal": "illicit",
    "Illegal goods and services": "illicit",
    "Non-violent crimes": "illicit",
    "Sexual content": "sexual",
}
# Categories that a row of the first may also belong to although nobody said so.
AGGRESSION = frozenset({"hate", "hate/threatening", "harassment", "harassment/threatening", "violence"})
VIOLENCE = AGGRESSION | {"illicit", "illicit/violent", "violence/graphic"}
MAY_ALSO_BE: dict[str, frozenset[str]] = {
    "harassment": AGGRESSION | {"sexual"},
    "harassment/threatening": VIOLENCE,
    "hate": AGGRESSION,
    "hate/threatening": VIOLENCE,
    "illicit": frozenset({"harassment", "violence", "sexual"}),
    "illicit/violent": VIOLENCE,
    "self-harm": frozenset({"violence"}),
    "self-harm/intent": frozenset({"self-harm/instructions"}),
    "self-harm/instructions": frozenset({"self-harm/intent", "illicit"}),
    "sexual": frozenset({"harassment", "violence"}),
    "sexual/minors": frozenset({"illicit", "illicit/violent", "violence"}),
    "violence": VIOLENCE,
    "violence/graphic": VIOLENCE | {"sexual"},
    "jailbreak": frozenset(OUTPUTS),
}


def category_of(row: Row) -> str | None:
    """One of OUTPUTS besides the first, or None where the source does not say."""
    if row.label == 0:
        return None
    if row.category in OUTPUTS[1:]:
        return row.category
    return OF_SOURCE.get(row.source.removeprefix("hidden:")) or OF_NAME.get(row.category)


def rows_by_category(rows: Iterable[Row]) -> dict[str, int]:
    """How many rows teach each category, a sub-category counting for its parent as well."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(_members(category_of(row)))
    return dict(sorted(counts.items()))


def targets_of(row: Row) -> list[float]:
    """One of 1.0, 0.0 and NaN (unknown) for each of OUTPUTS. A harmless row is a 0 everywhere."""
    if row.label == 0:
        return [0.0] * len(OUTPUTS)
    category = category_of(row)
    return [1.0, *(_target(output, category) for output in OUTPUTS[1:])]


def _target(output: str, category: str | None) -> float:
    if output in _members(category):
        return 1.0
    if category is None:
        # None of the sources without categories holds attempts to talk a model out of its rules.
        return 0.0 if output in EXTENSIONS else UNKNOWN
    is_part = output.partition("/")[0] == category
    return UNKNOWN if is_part or output in MAY_ALSO_BE[category] else 0.0


def _members(category: str | None) -> set[str]:
    """The category and, for "hate/threatening", its parent "hate"."""
    return set() if category is None else {category, category.partition("/")[0]}
