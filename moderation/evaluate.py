"""What a policy is worth: measures on every test file, and how many ordinary first turns it would refuse.

Goes through `Policy`, not through the classifier, so that windows and joined turns are part of every figure.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moderation.corpus import MEANT_AS_HARMFUL, VALIDATION_FILES, list_test_files
from moderation.metrics import Measures, measure
from moderation.policy import Policy, Turn
from moderation.rows import Row, conversations, labelled_rows
from quant.progress import ProgressSink

__all__ = ["FileReport", "OrdinaryReport", "Report", "evaluate_policy", "ordinary_report", "refused_conversations"]


@dataclass(frozen=True, slots=True)
class FileReport:
    name: str
    sha256: str
    overall: Measures
    by_language: dict[str, Measures]


@dataclass(frozen=True, slots=True)
class OrdinaryReport:
    """First turns of one validation file.

    `meant_as_harmful` are the rows of sources whose prompts ask for harm by design; the others are ordinary, and a flag
    on one of them is a false positive.
    """

    name: str
    rows: int
    flagged: int
    ordinary: int
    ordinary_flagged: int
    meant_as_harmful: int
    meant_as_harmful_flagged: int
    ordinary_conversations_flagged_at_any_turn: int

    @property
    def false_positive_rate(self) -> float:
        return self.ordinary_flagged / max(1, self.ordinary)


@dataclass(frozen=True, slots=True)
class Report:
    model: str
    threshold: float
    tests: list[FileReport]
    ordinary: list[OrdinaryReport]
    milliseconds_per_message: float


def evaluate_policy(policy: Policy, data: Path, progress: ProgressSink) -> Report:
    """Every `moderation/test_*` file and the first turns of the validation files under `data`."""
    names = list_test_files(data)
    tests: list[FileReport] = []
    spent_s, num_texts = 0.0, 0
    for i, name in enumerate(names):
        rows, file = labelled_rows(data, name)
        began_s = time.thread_time()
        probabilities = _probabilities(policy, rows)
        spent_s, num_texts = spent_s + time.thread_time() - began_s, num_texts + len(rows)
        tests.append(_file_report(name, file.sha256, rows, probabilities, policy.threshold))
        progress.update("evaluating", i + 1, len(names) + len(VALIDATION_FILES))
    ordinary: list[OrdinaryReport] = []
    for name in VALIDATION_FILES:
        ordinary.append(ordinary_report(policy, data, name))
        progress.update("evaluating", len(names) + len(ordinary), len(names) + len(VALIDATION_FILES))
    pace_ms = 1000.0 * spent_s / max(1, num_texts)
    return Report(policy.model_id, policy.threshold, tests, ordinary, round(pace_ms, 3))


def ordinary_report(policy: Policy, data: Path, name: str) -> OrdinaryReport:
    """Judges the first turn of every conversation, and each later user turn of the ordinary ones in its context."""
    loaded = conversations(data, name)
    is_ordinary = [source not in MEANT_AS_HARMFUL for source, _ in loaded]
    is_flagged = [policy.judge_input(turns[:1]).flagged for _, turns in loaded]
    ordinary_flagged = sum(flag for flag, ordinary in zip(is_flagged, is_ordinary, strict=True) if ordinary)
    return OrdinaryReport(
        name=name,
        rows=len(loaded),
        flagged=sum(is_flagged),
        ordinary=sum(is_ordinary),
        ordinary_flagged=ordinary_flagged,
        meant_as_harmful=len(loaded) - sum(is_ordinary),
        meant_as_harmful_flagged=sum(is_flagged) - ordinary_flagged,
        ordinary_conversations_flagged_at_any_turn=refused_conversations(
            policy, [turns for (_, turns), ordinary in zip(loaded, is_ordinary, strict=True) if ordinary]
        ),
    )


def refused_conversations(policy: Policy, chats: Sequence[Sequence[Turn]]) -> int:
    """How many conversations meet a refusal at one of their user turns."""
    return sum(
        any(policy.judge_input(turns[: i + 1]).flagged for i, turn in enumerate(turns) if turn.role == "user")
        for turns in chats
    )


def _probabilities(policy: Policy, rows: Sequence[Row]) -> list[float]:
    return [verdict.probability for verdict in policy.judge_texts([row.text for row in rows])]


def _file_report(
    name: str, sha256: str, rows: Sequence[Row], probabilities: Sequence[float], threshold: float
) -> FileReport:
    def measure_where(chosen: Sequence[int]) -> Measures:
        labels = np.array([rows[i].label for i in chosen], np.int64)
        return measure(labels, np.array([probabilities[i] for i in chosen], np.float64), threshold)

    languages = sorted({row.lang for row in rows})
    by_language = {lang: [i for i, row in enumerate(rows) if row.lang == lang] for lang in languages}
    return FileReport(
        name,
        sha256,
        measure_where(range(len(rows))),
        {lang: measure_where(chosen) for lang, chosen in by_language.items()} if len(languages) > 1 else {},
    )
