"""The figures of one judged file: measures overall and by group, curve, reliability, scores of single categories.

Pure: takes rows with their verdicts, reads no file and asks no policy. `moderation.evaluate` brings them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moderation.metrics import (
    FlagArray,
    FloatArray,
    LabelArray,
    Measures,
    area_under_precision_recall,
    area_under_roc,
    measure_flags,
    precision_recall_points,
    recall_at_false_positive_rate,
    reliability_bins,
)
from moderation.policy import Verdict
from moderation.report import CategoryMeasures, FileReport
from moderation.rows import DataFile, Row

__all__ = ["Judged", "file_report"]

LENGTH_BUCKETS = (("under 50", 50), ("50 to 199", 200), ("200 to 999", 1000), ("1000 and more", None))
CATEGORY_SEPARATOR = re.compile(r",(?! )")
MIN_CATEGORY_ROWS = 5


@dataclass(frozen=True, slots=True)
class Judged:
    """Rows with the verdict on each, in the file's order."""

    file: DataFile
    rows: list[Row]
    verdicts: list[Verdict]

    @property
    def labels(self) -> LabelArray:
        return np.array([row.label for row in self.rows], np.int64)

    @property
    def probabilities(self) -> FloatArray:
        return np.array([verdict.probability for verdict in self.verdicts], np.float64)

    @property
    def flagged(self) -> FlagArray:
        return np.array([verdict.flagged for verdict in self.verdicts], np.bool_)

    @property
    def pairs(self) -> list[tuple[Row, Verdict]]:
        return list(zip(self.rows, self.verdicts, strict=True))


def file_report(judged: Judged, trained: Sequence[str]) -> FileReport:
    labels, probabilities = judged.labels, judged.probabilities
    return FileReport(
        name=judged.file.name,
        sha256=judged.file.sha256,
        overall=measure_flags(labels, probabilities, judged.flagged),
        by_language=_measure_groups(judged, lambda row: [row.lang]),
        by_category=_measure_groups(judged, _categories),
        by_source=_measure_groups(judged, lambda row: [row.source]),
        by_length=_measure_groups(judged, lambda row: [_length_bucket(row.text)], [name for name, _ in LENGTH_BUCKETS]),
        curve=precision_recall_points(labels, probabilities),
        reliability=reliability_bins(labels, probabilities),
        recall_at_1_percent=recall_at_false_positive_rate(labels, probabilities, 0.01),
        category_scores=_category_measures(judged, trained),
    )


def _measure_groups(
    judged: Judged, groups_of: Callable[[Row], Sequence[str]], order: Sequence[str] | None = None
) -> dict[str, Measures]:
    """Measures of each group, sorted or in `order`; empty if there is only one."""
    members: dict[str, list[int]] = {}
    for i, row in enumerate(judged.rows):
        for group in groups_of(row):
            members.setdefault(group, []).append(i)
    if len(members) < 2:
        return {}
    labels, probabilities, flagged = judged.labels, judged.probabilities, judged.flagged
    names = sorted(members) if order is None else [name for name in order if name in members]
    chosen = {name: np.array(members[name]) for name in names}
    return {name: measure_flags(labels[i], probabilities[i], flagged[i]) for name, i in chosen.items()}


def _categories(row: Row) -> list[str]:
    # "hate,violence" is two categories; "Suicide, Self-Harm, and Eating Disorders" is the name of one.
    return CATEGORY_SEPARATOR.split(row.category)


def _length_bucket(text: str) -> str:
    return next(name for name, end in LENGTH_BUCKETS if end is None or len(text) < end)


def _category_measures(judged: Judged, trained: Sequence[str]) -> dict[str, CategoryMeasures]:
    """Of the trained categories that the file itself labels; one of few rows says nothing and is left out."""
    found: dict[str, CategoryMeasures] = {}
    for name in trained:
        labels = np.array([name in _categories(row) for row in judged.rows], np.int64)
        if MIN_CATEGORY_ROWS <= labels.sum() < len(labels):
            scores = np.array([_score(verdict, name) for verdict in judged.verdicts], np.float64)
            areas = area_under_roc(labels, scores), area_under_precision_recall(labels, scores)
            found[name] = CategoryMeasures(int(labels.sum()), *areas)
    return found


def _score(verdict: Verdict, name: str) -> float:
    return verdict.category_scores[name] if name in verdict.category_scores else verdict.extension_scores[name]
