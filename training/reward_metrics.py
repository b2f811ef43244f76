"""How well scores agree with people's preferences: accuracy with intervals, calibration, length bias.

Pure functions on numbers; `training.reward_report` turns their results into files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import correlation

from training.evaluate.intervals import Measure, share_measure

NUM_BINS = 10


@dataclass(frozen=True, slots=True)
class Comparison:
    """One preferred answer beside the one it was preferred to. Lengths are in tokens."""

    source: str
    better_score: float
    worse_score: float
    better_length: int
    worse_length: int

    @property
    def credit(self) -> float:
        """1 for the preferred answer first, 0 for last, 1/2 for equal scores."""
        return float(self.better_score > self.worse_score) + 0.5 * (self.better_score == self.worse_score)

    @property
    def confidence(self) -> float:
        """The model's own probability that the answer it puts first is preferred, in [1/2, 1]."""
        return 1 / (1 + math.exp(-abs(self.better_score - self.worse_score)))


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Comparisons whose confidence lies in [from_, to): how confident, and how often right."""

    from_: float
    to: float
    pairs: int
    mean_confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class LengthBias:
    """How far scores follow length. Correlations are Pearson's; None where one side never varies.

    score_to_length:           over all answers
    margin_to_length_margin:   over comparisons, differences of both: what is left when the prompt is the same
    longer_scores_higher:      share of comparisons (of unequal lengths) in which the longer answer gets more
    longer_is_preferred:       the same share in the labels
    """

    score_to_length: float | None
    margin_to_length_margin: float | None
    longer_scores_higher: Measure | None
    longer_is_preferred: Measure | None


def accuracy(comparisons: Iterable[Comparison]) -> Measure | None:
    """None without a comparison."""
    return _share(comparison.credit for comparison in comparisons)


def accuracy_by_source(comparisons: Sequence[Comparison]) -> Mapping[str, Measure]:
    """In the order of the sources' names."""
    sources = sorted({comparison.source for comparison in comparisons})
    return {source: share_measure([item.credit for item in comparisons if item.source == source]) for source in sources}


def accuracy_where_shorter_is_better(comparisons: Iterable[Comparison]) -> Measure | None:
    """On the rows that a model which only counts tokens gets wrong."""
    return accuracy(item for item in comparisons if item.better_length < item.worse_length)


def calibration(comparisons: Sequence[Comparison]) -> tuple[tuple[CalibrationBin, ...], float | None]:
    """Bins of equal width over confidences [1/2, 1] that hold a comparison, and the expected calibration error.

    The error is the mean over comparisons of |accuracy - mean confidence| of their bin (arXiv:1706.04599, section 2).
    """
    binned: list[list[Comparison]] = [[] for _ in range(NUM_BINS)]
    for comparison in comparisons:
        binned[min(int((comparison.confidence - 0.5) * 2 * NUM_BINS), NUM_BINS - 1)].append(comparison)
    bins = tuple(_bin(index, members) for index, members in enumerate(binned) if members)
    if not bins:
        return (), None
    error = sum(item.pairs * abs(item.accuracy - item.mean_confidence) for item in bins) / len(comparisons)
    return bins, error


def _bin(index: int, members: Sequence[Comparison]) -> CalibrationBin:
    return CalibrationBin(
        from_=0.5 + index / (2 * NUM_BINS),
        to=0.5 + (index + 1) / (2 * NUM_BINS),
        pairs=len(members),
        mean_confidence=sum(item.confidence for item in members) / len(members),
        accuracy=sum(item.credit for item in members) / len(members),
    )


def length_bias(comparisons: Sequence[Comparison], scores: Sequence[float], lengths: Sequence[int]) -> LengthBias:
    """scores, lengths: of every answer once, also of those in several comparisons."""
    unequal = [item for item in comparisons if item.better_length != item.worse_length]
    # As longer minus shorter, so that which one was preferred plays no part.
    margins = [_signed(item.better_score - item.worse_score, item) for item in unequal]
    length_margins = [_signed(item.better_length - item.worse_length, item) for item in unequal]
    return LengthBias(
        score_to_length=_correlation(scores, lengths),
        margin_to_length_margin=_correlation(margins, length_margins),
        longer_scores_higher=_share(0.5 + 0.5 * math.copysign(margin != 0, margin) for margin in margins),
        longer_is_preferred=_share(float(item.better_length > item.worse_length) for item in unequal),
    )


def _signed(margin: float, comparison: Comparison) -> float:
    return margin if comparison.better_length > comparison.worse_length else -margin


def _share(outcomes: Iterable[float]) -> Measure | None:
    found = list(outcomes)
    return share_measure(found) if found else None


def _correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    if len(set(one)) < 2 or len(set(other)) < 2:
        return None
    return correlation(one, other)
