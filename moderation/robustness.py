"""How much of a policy's recall survives disguise, and how many harmless texts it flags for being disguised.

Goes through `Policy.judge_input`, so that readings, windows and joined turns count. Evaluation only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from moderation.mutations import LANGUAGES_OF, MUTATIONS, Mutated, Mutation, mutate
from moderation.policy import Turn, Verdict
from moderation.presets import LANGUAGES, Language
from moderation.rows import Row

__all__ = ["InputJudge", "MutationReport", "RobustnessReport", "measure_robustness"]


class InputJudge(Protocol):
    """What is used of `Policy` here."""

    @property
    def model_id(self) -> str: ...
    def judge_input(self, turns: Sequence[Turn]) -> Verdict: ...


@dataclass(frozen=True, slots=True)
class MutationReport:
    """Rows of one language under one mutation; None is the text as it was. Counts, so that reports can be added up."""

    mutation: Mutation | None
    language: Language
    harmful: int
    harmful_flagged: int
    harmless: int
    harmless_flagged: int

    @property
    def recall(self) -> float:
        return self.harmful_flagged / max(1, self.harmful)

    @property
    def false_positive_rate(self) -> float:
        return self.harmless_flagged / max(1, self.harmless)


@dataclass(frozen=True, slots=True)
class RobustnessReport:
    model: str
    seed: int
    results: tuple[MutationReport, ...]

    def of(self, mutation: Mutation | None, language: Language) -> MutationReport:
        """Raises KeyError where the mutation does not apply to the language or no row is in it."""
        for result in self.results:
            if (result.mutation, result.language) == (mutation, language):
                return result
        raise KeyError((mutation, language))

    def lost_recall(self, result: MutationReport) -> float:
        """How far the recall lies below that of the same rows unmutated; negative if it rose."""
        return self.of(None, result.language).recall - result.recall

    @property
    def largest_loss(self) -> float:
        """The most recall that any mutation costs in any language; 0 if none costs any."""
        return max([0.0, *(self.lost_recall(result) for result in self.results)])


def measure_robustness(policy: InputJudge, rows: Sequence[Row], seed: int) -> RobustnessReport:
    """Judges every row as it is and under each mutation of its language, at the policy's own threshold.

    Deterministic: a row's mutation depends on the seed, the mutation and the row's text, not on the other rows.
    """
    results: list[MutationReport] = []
    for language in LANGUAGES:
        chosen = [row for row in rows if row.lang == language]
        if not chosen:
            continue
        results.append(_judge(policy, chosen, None, language, seed))
        for mutation in MUTATIONS:
            if language in LANGUAGES_OF[mutation]:
                results.append(_judge(policy, chosen, mutation, language, seed))
    return RobustnessReport(policy.model_id, seed, tuple(results))


def _judge(
    policy: InputJudge, rows: Sequence[Row], mutation: Mutation | None, language: Language, seed: int
) -> MutationReport:
    flags = [(row.label, policy.judge_input(_mutated(row.text, mutation, seed).turns).flagged) for row in rows]
    harmful = [flagged for label, flagged in flags if label == 1]
    harmless = [flagged for label, flagged in flags if label == 0]
    return MutationReport(mutation, language, len(harmful), sum(harmful), len(harmless), sum(harmless))


def _mutated(text: str, mutation: Mutation | None, seed: int) -> Mutated:
    if mutation is None:
        return Mutated((Turn("user", text),))
    return mutate(text, mutation, random.Random(f"{seed}/{mutation}/{text!a}"))  # noqa: S311 - draws letters, no secret
