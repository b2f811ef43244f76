from __future__ import annotations

import pytest

from benchmarks.gaps import Round, _row, p99

pytestmark = pytest.mark.unit


def test_one_gap_in_a_hundred_may_be_longer_than_the_p99() -> None:
    assert p99([0.001] * 199 + [5.0]) == 0.001
    assert p99([0.001] * 196 + [5.0] * 4) == 5.0
    assert p99([0.3]) == 0.3


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    """A machine that is slow for one whole round changes none."""
    rounds = [Round([0.01 * k] * 50, [0.02 * k] * 50, 1.0) for k in (1, 2, 9)]
    row = _row(8, 2.5, rounds, 500.0)
    assert (row.ratio_p50, row.ratio_p99) == (2.0, 2.0)
    assert row.idle_p99_ms == pytest.approx(20.0)
