from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from moderation.metrics import (
    CurvePoint,
    ReliabilityBin,
    Share,
    area_under_precision_recall,
    area_under_roc,
    calibration_error,
    measure,
    measure_flags,
    precision_recall_points,
    recall_at_false_positive_rate,
    reliability_bins,
    wilson_interval,
)

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("num_distinct", [3, 20, 10_000])
def test_areas_agree_with_scikit_learn_also_with_ties(num_distinct: int) -> None:
    rng = np.random.default_rng(num_distinct)
    labels = rng.integers(0, 2, 500)
    scores = np.round(rng.random(500) * 0.7 + labels * 0.3, 12)
    scores = np.floor(scores * num_distinct) / num_distinct

    assert area_under_roc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    expected = average_precision_score(labels, scores)
    assert area_under_precision_recall(labels, scores) == pytest.approx(expected, abs=1e-12)


def test_measures_of_four_rows_by_hand() -> None:
    labels = np.array([1, 1, 0, 0])
    probabilities = np.array([0.9, 0.2, 0.6, 0.1])

    measures = measure(labels, probabilities, threshold=0.6)

    assert (measures.rows, measures.harmful) == (4, 2)
    assert (measures.precision, measures.recall, measures.false_positive_rate) == (0.5, 0.5, 0.5)
    assert measures.auroc == 0.75  # of the four pairs, only (0.2, 0.6) is in the wrong order
    assert measures.auprc == pytest.approx((1.0 + 2 / 3) / 2)


def test_calibration_error_of_two_bins_by_hand() -> None:
    labels = np.array([0, 1, 1, 1])
    probabilities = np.array([0.5, 0.5, 0.9, 0.9])

    assert calibration_error(labels, probabilities) == pytest.approx(0.5 * 0.0 + 0.5 * 0.1)


def test_a_probability_of_one_falls_into_the_last_bin() -> None:
    assert calibration_error(np.array([1, 1]), np.array([1.0, 1.0])) == 0.0


def test_a_file_of_one_label_has_no_area_and_no_share_of_the_other() -> None:
    measures = measure(np.array([0, 0]), np.array([0.1, 0.2]), threshold=0.5)

    assert measures.auroc is None
    assert measures.recall is None
    assert measures.precision is None
    assert measures.false_positive_rate == 0.0


def test_flags_are_taken_as_given_and_areas_from_the_probabilities() -> None:
    labels, probabilities = np.array([1, 1, 0, 0]), np.array([0.9, 0.8, 0.2, 0.1])

    measures = measure_flags(labels, probabilities, np.array([False, True, True, False]))

    assert (measures.precision, measures.recall, measures.false_positive_rate) == (0.5, 0.5, 0.5)
    assert measures.auroc == 1.0


def test_curve_has_one_point_for_each_distinct_threshold_by_hand() -> None:
    labels, scores = np.array([1, 0, 1, 0]), np.array([0.9, 0.5, 0.5, 0.1])

    assert precision_recall_points(labels, scores) == [
        CurvePoint(0.9, 1.0, 0.5),
        CurvePoint(0.5, 2 / 3, 1.0),
        CurvePoint(0.1, 0.5, 1.0),
    ]


def test_curve_of_a_file_without_harmful_rows_is_empty() -> None:
    assert precision_recall_points(np.array([0, 0]), np.array([0.1, 0.2])) == []


def test_thinned_curve_keeps_its_ends_and_its_shape() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 3000)
    scores = rng.random(3000) * 0.6 + labels * 0.4

    whole = precision_recall_points(labels, scores, max_points=3000)
    thinned = precision_recall_points(labels, scores, max_points=50)

    assert len(thinned) <= 50
    assert set(thinned) <= set(whole)
    assert (thinned[0], thinned[-1]) == (whole[0], whole[-1])
    recalls = [point.recall for point in thinned]
    assert recalls == sorted(recalls)
    assert max(np.diff([0.0, *recalls])) < 0.05


@pytest.mark.parametrize(("max_rate", "recall"), [(0.0, 1 / 3), (0.49, 1 / 3), (0.5, 2 / 3), (1.0, 1.0)])
def test_recall_at_a_false_positive_rate_by_hand(max_rate: float, recall: float) -> None:
    labels, scores = np.array([1, 0, 1, 0, 1]), np.array([0.9, 0.8, 0.7, 0.6, 0.5])

    assert recall_at_false_positive_rate(labels, scores, max_rate) == pytest.approx(recall)


def test_recall_at_a_rate_splits_no_tie_and_needs_both_labels() -> None:
    assert recall_at_false_positive_rate(np.array([1, 0]), np.array([0.5, 0.5]), 0.5) == 0.0
    assert recall_at_false_positive_rate(np.array([1, 1]), np.array([0.5, 0.5]), 0.5) is None


def test_reliability_bins_by_hand_hold_every_row_and_give_the_calibration_error() -> None:
    labels, probabilities = np.array([0, 1, 1, 1]), np.array([0.5, 0.5, 0.9375, 1.0])

    bins = reliability_bins(labels, probabilities)

    assert bins == [
        ReliabilityBin(7 / 15, 8 / 15, 2, 0.5, 0.5),
        ReliabilityBin(14 / 15, 1.0, 2, 0.96875, 1.0),
    ]
    error = sum(one.rows * abs(one.share_harmful - one.mean_probability) for one in bins) / 4
    assert calibration_error(labels, probabilities) == pytest.approx(error)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # 0 of n ends at z2 / (n + z2) = 3.8415 / 13.8415; 5 of 10 is 0.5 with half-width 1.96 / 2 / sqrt(10 + z2).
    [(0, 10, 0.0, 0.27754), (10, 10, 0.72246, 1.0), (5, 10, 0.23659, 0.76341)],
)
def test_wilson_interval_by_hand(hits: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(hits, count) == pytest.approx((low, high), abs=2e-5)


def test_a_share_of_nothing_has_no_value() -> None:
    assert Share(1, 4).value == 0.25
    assert (Share(0, 0).value, Share(0, 0).interval) == (None, None)
