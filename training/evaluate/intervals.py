"""Intervals of 95 % around shares and means. Pure functions on numbers; the same seed gives the same interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Measure", "mean_measure", "ratio_measure", "share_measure"]

# Standard normal quantile of 0.975.
_Z = 1.959963984540054
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure over `count` independent things; low and high are None where no interval has a meaning."""

    value: float
    low: float | None
    high: float | None
    count: int


def share_measure(outcomes: Sequence[float]) -> Measure:
    """Mean of outcomes in [0, 1] (a tie is 0.5) with Wilson's score interval; for ties it is wider than need be.

    Source: Wilson 1927; it keeps to [0, 1] and has a width also where all outcomes are alike.
    """
    if not outcomes or min(outcomes) < 0 or max(outcomes) > 1:
        raise ValueError("a share needs at least one outcome, all between 0 and 1")
    count = len(outcomes)
    share = math.fsum(outcomes) / count
    z2 = _Z * _Z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    # At a share of 0 or 1 the end is exact; rounding must not put it on the wrong side of the value.
    return Measure(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)), count)


def mean_measure(values: Sequence[float], *, seed: int) -> Measure:
    """Mean with a percentile bootstrap over the values. Pairing is the caller's: pass differences."""
    return ratio_measure(values, [1.0] * len(values), seed=seed)


def ratio_measure(numerators: Sequence[float], denominators: Sequence[float], *, seed: int) -> Measure:
    """Sum over sum with a percentile bootstrap that draws pairs: a mean per token over texts of unequal lengths."""
    if not numerators or len(numerators) != len(denominators) or min(denominators) <= 0:
        raise ValueError("a ratio needs as many denominators above 0 as numerators, at least one")
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    count = len(above)
    value = float(above.sum() / below.sum())
    if count == 1:
        return Measure(value, None, None, 1)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, count, size=(_RESAMPLES, count))
    low, high = np.quantile(above[drawn].sum(1) / below[drawn].sum(1), [0.025, 0.975])
    return Measure(value, float(low), float(high), count)
