"""The worst mistakes, for a reader of the model card: only rows that may be shipped, and none of a test file."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest

from moderation.corpus import MEANT_AS_HARMFUL
from moderation.file_figures import Judged
from moderation.policy import Verdict
from moderation.report import Example, ExampleKind
from moderation.rows import Licences, Row

__all__ = ["worst_examples"]

MAX_EXAMPLES = 20
MAX_EXAMPLE_CHARS = 120


def worst_examples(dev: Judged, ordinary: Sequence[Judged], licences: Licences) -> list[Example]:
    """The worst mistakes on rows that may be shipped, half of each kind, sources in turns."""
    harmless = [pair for judged in (dev, *ordinary) for pair in judged.pairs if pair[0].label == 0]
    false_positives = [pair for pair in harmless if pair[1].flagged and pair[0].source not in MEANT_AS_HARMFUL]
    false_negatives = [pair for pair in dev.pairs if pair[0].label == 1 and not pair[1].flagged]
    false_positives.sort(key=lambda pair: -pair[1].probability)
    false_negatives.sort(key=lambda pair: pair[1].probability)
    kinds: tuple[tuple[ExampleKind, list[tuple[Row, Verdict]]], ...] = (
        ("false positive", false_positives),
        ("false negative", false_negatives),
    )
    return [
        Example(kind, _cut(row.text), row.lang, row.source, row.category, verdict.probability)
        for kind, pairs in kinds
        for row, verdict in _sources_in_turns(pairs, licences)[: MAX_EXAMPLES // 2]
    ]


def _sources_in_turns(pairs: Sequence[tuple[Row, Verdict]], licences: Licences) -> list[tuple[Row, Verdict]]:
    """First the worst of every source, then the second worst: one source alone would show one way to fail."""
    by_source: dict[str, list[tuple[Row, Verdict]]] = {}
    for pair in pairs:
        if licences.allow(pair[0].source):
            by_source.setdefault(pair[0].source, []).append(pair)
    return [pair for pair in chain.from_iterable(zip_longest(*by_source.values())) if pair is not None]


def _cut(text: str) -> str:
    return text if len(text) <= MAX_EXAMPLE_CHARS else f"{text[: MAX_EXAMPLE_CHARS - 1]}…"
