"""The learning rate at a step. Pure."""

from __future__ import annotations

import math

from training.settings import Schedule


def learning_rate_at(
    step: int, num_steps: int, *, peak: float, schedule: Schedule, warmup: float, final_share: float
) -> float:
    """Rate of optimizer step `step` in 0..num_steps-1: a linear rise over `warmup` of the steps, then the schedule.

    The first step's rate is above 0, and the last step's is `final_share` of the peak unless the schedule is constant.
    """
    num_warmup = math.ceil(warmup * num_steps)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    if schedule == "constant":
        return peak
    share = (step - num_warmup + 1) / max(1, num_steps - num_warmup)
    falling = (1 - share) if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return peak * (final_share + (1 - final_share) * falling)
