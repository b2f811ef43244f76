"""Turns a classifier's probabilities into a verdict on a conversation. The gateway asks here before it queues anything.

The rule of `judge_input`: the verdict's probability is the highest over
  - every window of every user, tool and system turn, old ones too: the client sends the whole conversation anew, and
    nothing says that an earlier turn was ever judged or that an assistant turn was the model's,
  - the last `joined_chars` characters of the user turns joined, so that a request split over turns is seen whole.
Assistant turns are not judged: what the model says is `stream_filter`'s side. Windows overlap and cover every
character, so a harmful sentence is not diluted by a long text; the cost is linear in the text's length.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moderation.categories import Category, complete_flags, complete_scores
from moderation.classifier import NgramClassifier, TextClassifier
from moderation.errors import ModerationError
from moderation.features import CJK

__all__ = ["Policy", "Turn", "Verdict", "WindowOptions", "load_policy", "split_windows"]

CJK_CHARACTER = re.compile(f"[{CJK}]")
CJK_DENSITY = 3
MOSTLY = 0.3


@dataclass(frozen=True, slots=True)
class Turn:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """`categories` and `category_scores` carry all of OpenAI's names; untrained ones are False and 0.0."""

    flagged: bool
    probability: float
    threshold: float
    categories: dict[str, bool]
    category_scores: dict[str, float]


@dataclass(frozen=True, slots=True)
class WindowOptions:
    """Sizes in characters. A text up to `window_chars` is judged in one piece.

    A Chinese character says about what three Latin letters say: in mostly Chinese text all sizes are a third.
    """

    window_chars: int = 300
    stride_chars: int = 150
    joined_chars: int = 1200

    def __post_init__(self) -> None:
        if not 0 < self.stride_chars <= self.window_chars:
            raise ModerationError(
                f"stride_chars is {self.stride_chars}; it must be between 1 and window_chars ({self.window_chars})"
            )


class Policy:
    """Thread-safe: holds no state between calls. Raises ModerationError when it cannot judge; that means refuse."""

    def __init__(
        self, classifier: TextClassifier, threshold: float | None = None, windows: WindowOptions | None = None
    ) -> None:
        """threshold: probability from which on a text is flagged, 0 < t <= 1; None takes the classifier's own."""
        chosen = classifier.threshold("balanced", "en") if threshold is None else threshold
        if not 0.0 < chosen <= 1.0:
            raise ModerationError(f"the moderation threshold is {chosen}; it must be above 0 and at most 1")
        self._classifier = classifier
        self.threshold = chosen
        self._windows = windows or WindowOptions()

    @property
    def model_id(self) -> str:
        """What `/v1/moderations` names as `model`."""
        return f"{self._classifier.name}-{self._classifier.version}"

    @property
    def trained_categories(self) -> tuple[Category, ...]:
        return self._classifier.trained_categories

    def judge_input(self, turns: Sequence[Turn]) -> Verdict:
        """Judges the new user message and the conversation that carries it, by the rule in the module's docstring."""
        return self._verdict(self._highest(self._texts_to_judge(turns)))

    def judge_texts(self, texts: Sequence[str]) -> list[Verdict]:
        """One verdict a text, each by itself, in order."""
        return [self._verdict(self._highest([text])) for text in texts]

    def _texts_to_judge(self, turns: Sequence[Turn]) -> list[str]:
        texts = [turn.content for turn in turns if turn.role != "assistant"]
        user_turns = [turn.content for turn in turns if turn.role == "user"]
        if len(user_turns) > 1:
            texts.append("\n".join(user_turns)[-self._windows.joined_chars :])
        return texts

    def _highest(self, texts: Sequence[str]) -> float:
        pieces = [piece for text in texts for piece in split_windows(text, self._windows)]
        if not pieces:
            return 0.0
        probabilities = [scores.probability for scores in self._classifier.scores(pieces)]
        if len(probabilities) != len(pieces) or not all(math.isfinite(p) and 0.0 <= p <= 1.0 for p in probabilities):
            raise ModerationError(f"classifier {self.model_id} did not return one probability for each text")
        return max(probabilities)

    def _verdict(self, probability: float) -> Verdict:
        return Verdict(
            flagged=probability >= self.threshold,
            probability=probability,
            threshold=self.threshold,
            categories=complete_flags({}),
            category_scores=complete_scores({}),
        )


def split_windows(text: str, options: WindowOptions) -> list[str]:
    """Overlapping pieces that cover every character of `text`; an empty or blank text has none."""
    if not text.strip():
        return []
    size, stride = options.window_chars, options.stride_chars
    if len(CJK_CHARACTER.findall(text)) > MOSTLY * len(text):
        size, stride = -(-size // CJK_DENSITY), -(-stride // CJK_DENSITY)
    if len(text) <= size:
        return [text]
    last_start = len(text) - size
    starts = [*range(0, last_start, stride), last_start]
    return [text[start : start + size] for start in starts]


def load_policy(directory: Path | None = None, threshold: float | None = None) -> Policy:
    """The shipped classifier (or the one in `directory`) behind a policy. Raises WeightsError at start, not later."""
    return Policy(NgramClassifier.load(directory), threshold)
