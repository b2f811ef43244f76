"""Did a stage make its own held-out number better? A sign test over rows measured before and after. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from quant.model_directory import JsonValue


def sign_test(num_better: int, num_worse: int) -> float:
    """Probability of at least `num_better` of all, were better and worse equally likely (one-sided, exact). Ties are
    left out before; with nothing to count it is 1."""
    total = num_better + num_worse
    # Whole numbers to the end: with over a thousand rows they fit into no float.
    return sum(math.comb(total, count) for count in range(num_better, total + 1)) / 2**total


def loss_improvement(before: Sequence[float], after: Sequence[float]) -> dict[str, JsonValue]:
    """For the manifest. before, after: the same rows' losses, lower is better."""
    pairs = list(zip(before, after, strict=True))
    better = sum(new < old for old, new in pairs)
    worse = sum(new > old for old, new in pairs)
    return {
        "held_out_rows": len(pairs),
        "held_out_rows_better": better,
        "held_out_rows_worse": worse,
        "held_out_sign_test": sign_test(better, worse),
    }
