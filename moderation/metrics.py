"""Measures of a binary classifier from its scores: pure functions on arrays, no file and no model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Measures", "area_under_precision_recall", "area_under_roc", "calibration_error", "measure"]

FloatArray = npt.NDArray[np.float64]
LabelArray = npt.NDArray[np.int64]
NUM_BINS = 15


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


def measure(labels: LabelArray, probabilities: FloatArray, threshold: float) -> Measures:
    """labels: (n,) 0 or 1; probabilities: (n,) in [0, 1]; flagged means probability >= threshold."""
    flagged = probabilities >= threshold
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
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(labels[order])
    is_last_of_tie = np.append(np.diff(scores[order]) != 0, True)
    positions = np.flatnonzero(is_last_of_tie)
    precision = found[positions] / (positions + 1)
    recall = found[positions] / labels.sum()
    return float(np.sum(precision * np.diff(recall, prepend=0.0)))


def calibration_error(labels: LabelArray, probabilities: FloatArray) -> float:
    """Expected calibration error over equal-width bins: mean |share harmful - mean probability|, weighted by size."""
    bins = np.minimum((probabilities * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    sizes = np.bincount(bins, minlength=NUM_BINS)
    gaps = np.bincount(bins, labels - probabilities, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / sizes.sum())


def _share(flags: npt.NDArray[np.bool_]) -> float | None:
    return float(flags.mean()) if len(flags) else None
