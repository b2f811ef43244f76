"""The loss of a reward model over ranked answers: pure functions on scores, no model and no file.

`training.reward` calls them during training, `training.reward_metrics` takes the same pairs for its figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, slots=True)
class Pairs:
    """The comparisons within some rankings, as indices into one flat list of all their answers.

    better, worse: (pairs,) int64, the answer that was preferred and the one it was preferred to
    weight:        (pairs,) float32, 1 / C(K, 2) for a pair of a K-way ranking
    """

    better: Tensor
    worse: Tensor
    weight: Tensor

    def to(self, device: torch.device) -> Pairs:
        return Pairs(self.better.to(device), self.worse.to(device), self.weight.to(device))


def pairs_of(rankings: Sequence[Sequence[int]]) -> Pairs:
    """All comparisons of several rankings whose answers lie one ranking after another.

    rankings: for each the ranks of its answers, 1 is best; equal ranks are a tie, and a tie is no comparison.
    """
    found: list[tuple[int, int, float]] = []
    first = 0
    for ranks in rankings:
        possible = len(ranks) * (len(ranks) - 1) // 2
        for one, other in combinations(range(len(ranks)), 2):
            if ranks[one] != ranks[other]:
                better, worse = (one, other) if ranks[one] < ranks[other] else (other, one)
                found.append((first + better, first + worse, 1 / possible))
        first += len(ranks)
    return Pairs(
        better=torch.tensor([better for better, _, _ in found], dtype=torch.int64),
        worse=torch.tensor([worse for _, worse, _ in found], dtype=torch.int64),
        weight=torch.tensor([weight for _, _, weight in found], dtype=torch.float32),
    )


def pairwise_logistic_loss(scores: Tensor, pairs: Pairs) -> Tensor:
    """Minus the log of the probability that the preferred answer of each pair wins, weighted and summed.

    scores: (answers,) of any float type; the loss is taken in float32. Returns a scalar; 0 where there is no pair.
    Source: arXiv:2203.02155, equation 1. Divided by `pairs.weight.sum()` it is their mean over rankings; where ties
    leave a ranking with fewer pairs, it counts for less, so that each of its pairs counts as without them.
    """
    margins = scores.float()[pairs.better] - scores.float()[pairs.worse]
    return -(logsigmoid(margins) * pairs.weight).sum()
