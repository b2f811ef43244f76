from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from moderation.metrics import area_under_precision_recall, area_under_roc, calibration_error, measure

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
