"""Measures of a binary classifier from its scores: pure functions on arrays, no file and no model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = [
    "CurvePoint",
    "Measures",
    "ReliabilityBin",
    "Share",
    "area_under_precision_recall",
    "area_under_roc",
    "calibration_error",
    "measure",
    "measure_flags",
    "precision_recall_points",
    "recall_at_false_positive_rate",
    "reliability_bins",
    "wilson_interval",
]

FloatArray = npt.NDArray[np.float64]
LabelArray = npt.NDArray[np.int64]
FlagArray = npt.NDArray[np.bool_]
NUM_BINS = 15
# Standard normal quantile of 0.975.
Z_95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Measures:
    """Of one file at one threshold. None where a measure has no meaning (no row of a label, nothing flagged)."""

    rows: int
    harmful: int
    precision: float | None
    recall: float | None
    false_positive_rate: float | None
    auroc: float | None
    auprc: float | None
    calibration_error: float


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Flagging from `threshold` on finds `recall` of the harmful rows, and `precision` of what it flags is harmful."""

    threshold: float
    precision: float
    recall: float


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """The rows whose probability lies in [low, high): what was said, and what share of them is harmful."""

    low: float
    high: float
    rows: int
    mean_probability: float
    share_harmful: float


@dataclass(frozen=True, slots=True)
class Share:
    """`hits` of `count`; its interval is Wilson's, of 95 %."""

    hits: int
    count: int

    @property
    def value(self) -> float | None:
        return self.hits / self.count if self.count else None

    @property
    def interval(self) -> tuple[float, float] | None:
        return wilson_interval(self.hits, self.count) if self.count else None


def measure(labels: LabelArray, probabilities: FloatArray, threshold: float) -> Measures:
    """labels: (n,) 0 or 1; probabilities: (n,) in [0, 1]; flagged means probability >= threshold."""
    return measure_flags(labels, probabilities, probabilities >= threshold)


def measure_flags(labels: LabelArray, probabilities: FloatArray, flagged: FlagArray) -> Measures:
    """labels: (n,) 0 or 1; probabilities: (n,) in [0, 1]; flagged: (n,) bool, True where the policy refuses.

    The flags are given, not derived: a threshold may differ between languages, and a category may flag by itself.
    """
    is_harmful = labels == 1
    has_both = bool(is_harmful.any() and not is_harmful.all())
    return Measures(
        rows=len(labels),
        harmful=int(is_harmful.sum()),
        precision=_share(is_harmful[flagged]),
        recall=_share(flagged[is_harmful]),
        false_positive_rate=_share(flagged[~is_harmful]),
        auroc=area_under_roc(labels, probabilities) if has_both else None,
        auprc=area_under_precision_recall(labels, probabilities) if has_both else None,
        calibration_error=calibration_error(labels, probabilities),
    )


def area_under_roc(labels: LabelArray, scores: FloatArray) -> float:
    """Probability that a harmful row scores above a harmless one; a tie counts half (the Mann-Whitney statistic)."""
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(sizes)
    ranks = (last_rank - (sizes - 1) / 2.0)[group]
    num_harmful = int(labels.sum())
    num_harmless = len(labels) - num_harmful
    above = ranks[labels == 1].sum() - num_harmful * (num_harmful + 1) / 2.0
    return float(above / (num_harmful * num_harmless))


def area_under_precision_recall(labels: LabelArray, scores: FloatArray) -> float:
    """Average precision: over distinct thresholds, precision times the recall gained, without interpolation."""
    _, flagged, found = _at_distinct_thresholds(labels, scores)
    recall = found / labels.sum()
    return float(np.sum(found / flagged * np.diff(recall, prepend=0.0)))


def precision_recall_points(labels: LabelArray, scores: FloatArray, max_points: int = 100) -> list[CurvePoint]:
    """The curve that `area_under_precision_recall` sums, from the highest threshold to the lowest.

    Thinned to `max_points` at even steps of recall; the ends stay. Empty if no row is harmful.
    """
    if not labels.any():
        return []
    thresholds, flagged, found = _at_distinct_thresholds(labels, scores)
    recall = found / labels.sum()
    chosen = np.arange(len(recall))
    if len(recall) > max_points:
        # The lowest threshold comes by itself: many share the last recall, and the search finds the highest of them.
        wanted = np.linspace(recall[0], recall[-1], max_points - 1)
        chosen = np.unique(np.append(np.searchsorted(recall, wanted), len(recall) - 1))
    return [CurvePoint(float(thresholds[i]), float(found[i] / flagged[i]), float(recall[i])) for i in chosen]


def recall_at_false_positive_rate(labels: LabelArray, scores: FloatArray, max_rate: float) -> float | None:
    """The highest recall of any threshold that flags at most `max_rate` of the harmless rows. None if a label lacks."""
    num_harmful = int(labels.sum())
    num_harmless = len(labels) - num_harmful
    if num_harmful == 0 or num_harmless == 0:
        return None
    _, flagged, found = _at_distinct_thresholds(labels, scores)
    is_allowed = (flagged - found) <= max_rate * num_harmless
    return float(found[is_allowed].max(initial=0) / num_harmful)


def calibration_error(labels: LabelArray, probabilities: FloatArray) -> float:
    """Expected calibration error over equal-width bins: mean |share harmful - mean probability|, weighted by size."""
    bins = _bins(probabilities)
    sizes = np.bincount(bins, minlength=NUM_BINS)
    gaps = np.bincount(bins, labels - probabilities, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / sizes.sum())


def reliability_bins(labels: LabelArray, probabilities: FloatArray) -> list[ReliabilityBin]:
    """The bins of `calibration_error` that hold a row, from low to high."""
    bins = _bins(probabilities)
    return [
        ReliabilityBin(
            low=i / NUM_BINS,
            high=(i + 1) / NUM_BINS,
            rows=int((bins == i).sum()),
            mean_probability=float(probabilities[bins == i].mean()),
            share_harmful=float(labels[bins == i].mean()),
        )
        for i in range(NUM_BINS)
        if (bins == i).any()
    ]


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """Interval of 95 % around hits / count, count above 0; has a width also where hits is 0. Source: Wilson 1927."""
    share, z2 = hits / count, Z_95 * Z_95
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def _at_distinct_thresholds(
    labels: LabelArray, scores: FloatArray
) -> tuple[FloatArray, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(thresholds, rows flagged, harmful rows flagged) for every distinct score, highest first: (distinct,) each."""
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(labels[order])
    is_last_of_tie = np.append(np.diff(scores[order]) != 0, True)
    positions = np.flatnonzero(is_last_of_tie)
    return scores[order][positions], positions + 1, found[positions]


def _bins(probabilities: FloatArray) -> npt.NDArray[np.int64]:
    return np.minimum((probabilities * NUM_BINS).astype(np.int64), NUM_BINS - 1)


def _share(flags: FlagArray) -> float | None:
    return float(flags.mean()) if len(flags) else None
