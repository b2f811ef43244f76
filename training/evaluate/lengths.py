"""How long answers are, and how many were cut off."""

from __future__ import annotations

from collections.abc import Sequence

from training.evaluate.answers import Answer
from training.evaluate.intervals import Measure, mean_measure, share_measure

__all__ = ["length_measures"]


def length_measures(answers: Sequence[Answer], *, seed: int) -> dict[str, Measure]:
    """Tokens count the end of turn. `answers_ended`: share that ended by themselves; `answers_empty`: no text."""
    return {
        "answer_tokens": mean_measure([float(len(answer.answer_ids)) for answer in answers], seed=seed),
        "answer_characters": mean_measure([float(len(answer.text)) for answer in answers], seed=seed),
        "answers_ended": share_measure([float(answer.finish_reason == "stop") for answer in answers]),
        "answers_empty": share_measure([float(not answer.text.strip()) for answer in answers]),
    }
