"""Intervals against values worked out by hand, and what they must never do."""

from __future__ import annotations

import math

import pytest

from training.evaluate.intervals import mean_measure, ratio_measure, share_measure

pytestmark = pytest.mark.unit


def test_wilsons_interval_is_the_published_one() -> None:
    """8 of 10: centre (0.8 + z2/20) / (1 + z2/10) = 0.7168, half 0.2266, with z2 = 3.8415."""
    measure = share_measure([1.0] * 8 + [0.0] * 2)
    assert measure.value == 0.8
    assert measure.low == pytest.approx(0.4902, abs=1e-4)
    assert measure.high == pytest.approx(0.9433, abs=1e-4)


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_outcomes_that_are_all_alike_still_have_a_width(outcome: float) -> None:
    measure = share_measure([outcome] * 10)
    assert measure.low is not None
    assert measure.high is not None
    assert 0 <= measure.low <= measure.value <= measure.high <= 1
    assert measure.high - measure.low == pytest.approx(0.2775, abs=1e-3)


def test_ties_count_half() -> None:
    assert share_measure([1.0, 0.5, 0.5, 0.0]).value == 0.5


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one outcome"):
        share_measure([])


def test_the_bootstrap_is_near_the_normal_interval() -> None:
    values = [float(i % 10) for i in range(400)]
    measure = mean_measure(values, seed=0)
    half = 1.96 * math.sqrt(8.25 / 400)
    assert measure.value == 4.5
    assert measure.low == pytest.approx(4.5 - half, abs=0.05)
    assert measure.high == pytest.approx(4.5 + half, abs=0.05)
    assert measure == mean_measure(values, seed=0)


def test_a_ratio_weighs_by_its_denominators() -> None:
    """2 nats over 1 token and 9 over 9: 11 over 10, not the mean of 2 and 1."""
    assert ratio_measure([2.0, 9.0], [1.0, 9.0], seed=0).value == pytest.approx(1.1)


def test_one_value_has_no_interval() -> None:
    assert mean_measure([3.0], seed=0).low is None
