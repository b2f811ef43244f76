"""KL(new || old) per token and per answer, estimated on answers that the new model sampled at temperature 1.

Both models score the same ids. Source of the estimators: J. Schulman, "Approximating KL divergence" (2020): k1 is the
unbiased mean log ratio; k3 = exp(-k1) - 1 + k1 has the same mean, is never negative and varies less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from training.evaluate.intervals import Measure, mean_measure, ratio_measure

__all__ = ["Divergence", "kl_of_best_of", "measure_divergence"]


@dataclass(frozen=True, slots=True)
class Divergence:
    """In nats. per_token by k1, per_token_k3 by k3; per_answer is the sum over an answer's tokens by k1."""

    per_token: Measure
    per_token_k3: Measure
    per_answer: Measure


def measure_divergence(new: Sequence[Sequence[float]], old: Sequence[Sequence[float]], *, seed: int) -> Divergence:
    """new, old: per answer, the log-probability of each sampled id under either model. Raises ValueError if unequal."""
    ratios = [[a - b for a, b in zip(ours, theirs, strict=True)] for ours, theirs in zip(new, old, strict=True)]
    lengths = [len(ratio) for ratio in ratios]
    k3 = [math.fsum(math.expm1(-value) + value for value in ratio) for ratio in ratios]
    sums = [math.fsum(ratio) for ratio in ratios]
    return Divergence(
        ratio_measure(sums, lengths, seed=seed), ratio_measure(k3, lengths, seed=seed), mean_measure(sums, seed=seed)
    )


def kl_of_best_of(n: int) -> float:
    """log n - (n - 1) / n: how far best-of-n moves from the model it draws from, in nats per answer, at most.

    Source: arXiv:2009.01325, appendix G.3; exact where no two answers tie, an upper bound otherwise.
    """
    return math.log(n) - (n - 1) / n
