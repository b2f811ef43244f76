"""Reward models as judges: win rates, what best-of-N gains, and where two judges disagree (over-optimisation)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from serving.model.chat_format import ChatMessage
from training.evaluate.intervals import Measure, mean_measure, share_measure

__all__ = ["Scorer", "best_of_curve", "best_of_index", "disagreement", "reward_gain", "win_rate"]


class Scorer(Protocol):
    """A reward model. Higher is better; the unit is the deviation of the rows it was normalised on."""

    def score(self, conversations: Sequence[Sequence[ChatMessage]]) -> list[float]:
        """One number for each conversation, which ends with the assistant's answer to judge."""
        ...


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> Measure:
    """Share of prompts on which our answer scores higher; a tie counts half. Pairs in order; Wilson's interval."""
    return share_measure([_outcome(a, b) for a, b in zip(ours, theirs, strict=True)])


def reward_gain(ours: Sequence[float], theirs: Sequence[float], *, seed: int) -> Measure:
    """Mean difference of the paired scores."""
    return mean_measure([a - b for a, b in zip(ours, theirs, strict=True)], seed=seed)


def disagreement(
    first: tuple[Sequence[float], Sequence[float]], second: tuple[Sequence[float], Sequence[float]]
) -> Measure:
    """Share of prompts on which the two judges name different winners. Each: (our scores, their scores)."""
    outcomes = [[_outcome(a, b) for a, b in zip(*scores, strict=True)] for scores in (first, second)]
    return share_measure([float(a != b) for a, b in zip(*outcomes, strict=True)])


def best_of_index(scores: Sequence[float]) -> int:
    """The first of the highest."""
    return max(range(len(scores)), key=lambda index: scores[index])


def best_of_curve(judged: Sequence[Sequence[float]], chosen_by: Sequence[Sequence[float]]) -> list[float]:
    """Mean score of best-of-k for k = 1..N: the expectation over all choices of k of the N answers.

    judged:    per prompt, N scores that are averaged
    chosen_by: per prompt, the N scores of the judge that chooses; the same as `judged`, or another judge's, to see
               whether what one likes the other likes too
    Source: the unbiased estimator of arXiv:2112.09332, appendix.
    """
    num = len(judged[0])
    totals = [0.0] * num
    for values, chooser in zip(judged, chosen_by, strict=True):
        # Ascending by the chooser; the r-th (from 1) is the best of k in C(r - 1, k - 1) of the C(N, k) choices.
        ordered = sorted(range(num), key=lambda index: chooser[index])
        for k in range(1, num + 1):
            weights = [math.comb(rank, k - 1) for rank in range(num)]
            total = sum(weight * values[index] for weight, index in zip(weights, ordered, strict=True))
            totals[k - 1] += total / math.comb(num, k)
    return [total / len(judged) for total in totals]


def _outcome(ours: float, theirs: float) -> float:
    return 1.0 if ours > theirs else 0.5 if ours == theirs else 0.0
