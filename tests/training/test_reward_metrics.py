"""Accuracy, calibration and length bias, by hand on a few comparisons and as properties."""

from __future__ import annotations

import math
import random

import pytest

from training.reward_metrics import (
    Comparison,
    accuracy,
    accuracy_by_source,
    accuracy_where_shorter_is_better,
    calibration,
    length_bias,
)

pytestmark = pytest.mark.unit


def comparison(margin: float, *, lengths: tuple[int, int] = (5, 5), source: str = "a") -> Comparison:
    return Comparison(source, margin, 0.0, *lengths)


def test_a_tie_of_scores_counts_half() -> None:
    measure = accuracy([comparison(1.0), comparison(-1.0), comparison(0.0), comparison(0.0)])
    assert measure is not None
    assert (measure.value, measure.count) == (0.5, 4)


def test_no_comparison_has_no_accuracy() -> None:
    assert accuracy([]) is None


def test_sources_are_counted_apart() -> None:
    found = accuracy_by_source([comparison(1.0, source="b"), comparison(-1.0), comparison(1.0)])
    assert list(found) == ["a", "b"]
    assert (found["a"].value, found["b"].value) == (0.5, 1.0)


def test_shorter_preferred_rows_show_a_model_that_counts_tokens() -> None:
    counts_tokens = [comparison(float(better - worse), lengths=(better, worse)) for better, worse in ((9, 3), (2, 8))]
    measure = accuracy_where_shorter_is_better(counts_tokens)
    assert measure is not None
    assert (measure.value, measure.count) == (0.0, 1)


def test_calibration_error_is_the_gap_of_confidence_and_accuracy() -> None:
    margin = math.log(0.8 / 0.2)  # a confidence of 0.8
    bins, error = calibration([comparison(margin)] * 3 + [comparison(-margin)] * 2)
    assert len(bins) == 1
    assert bins[0].mean_confidence == pytest.approx(0.8)
    assert bins[0].accuracy == pytest.approx(0.6)
    assert error == pytest.approx(0.2)


def test_outcomes_drawn_by_the_confidence_are_calibrated_and_doubled_margins_are_not() -> None:
    rng = random.Random(0)
    margins = [rng.uniform(0, 3) for _ in range(4000)]
    drawn = [margin if rng.random() < 1 / (1 + math.exp(-margin)) else -margin for margin in margins]
    _, error = calibration([comparison(margin) for margin in drawn])
    _, doubled = calibration([comparison(2 * margin) for margin in drawn])
    assert error is not None
    assert doubled is not None
    assert error < 0.03 < doubled


def test_very_large_margins_do_not_overflow() -> None:
    assert comparison(-1e4).confidence == 1.0


def test_length_bias_of_a_model_that_counts_tokens() -> None:
    pairs = [(9, 3), (2, 8), (4, 7)]
    comparisons = [comparison(float(better - worse), lengths=(better, worse)) for better, worse in pairs]
    lengths = [length for pair in pairs for length in pair]
    bias = length_bias(comparisons, [float(length) for length in lengths], lengths)
    assert bias.score_to_length == pytest.approx(1.0)
    assert bias.margin_to_length_margin == pytest.approx(1.0)
    assert bias.longer_scores_higher is not None
    assert bias.longer_is_preferred is not None
    assert bias.longer_scores_higher.value == 1.0
    assert bias.longer_is_preferred.value == pytest.approx(1 / 3)


def test_equal_scores_or_lengths_have_no_correlation() -> None:
    bias = length_bias([comparison(0.0)], [1.0, 1.0], [4, 6])
    assert bias.score_to_length is None
    assert bias.longer_scores_higher is None


def test_equal_scores_of_unequal_lengths_count_half() -> None:
    bias = length_bias([comparison(0.0, lengths=(4, 6))], [0.0, 0.0], [4, 6])
    assert bias.longer_scores_higher is not None
    assert bias.longer_scores_higher.value == 0.5
