"""Turns a classifier's scores into a verdict on a conversation, a text or a passage of an answer.

The gateway asks here before it queues anything and before it sends anything. The rule of `judge_input`: the verdict is
the most severe over
  - every window of every turn, old ones and assistant turns too: the client sends the whole conversation anew, and
    nothing says that an earlier turn was ever judged or that an assistant turn was the model's,
  - the last `joined_chars` characters of the user turns joined, so that a request split over turns is seen whole.
Windows overlap and cover every character, so a harmful sentence is not diluted by a long text; the cost is linear in
the text's length. Every text is judged in each of its `moderation.readings`: as it stands and as it decodes.
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

from moderation.cascade import load_classifier
from moderation.categories import Category, complete_flags, complete_scores
from moderation.classifier import Scores, TextClassifier
from moderation.errors import ModerationError
from moderation.features import CJK
from moderation.presets import DEFAULT_PRESET, Language, PresetName, language_of
from moderation.readings import readings

__all__ = [
    "CJK_DENSITY",
    "Direction",
    "Policy",
    "PolicyOptions",
    "Sensitivity",
    "Turn",
    "Verdict",
    "WindowOptions",
    "load_policy",
    "split_windows",
]

T = TypeVar("T")
Direction = Literal["input", "output"]

CJK_CHARACTER = re.compile(f"[{CJK}]")
CJK_DENSITY = 3
MOSTLY = 0.3
# Where a category has no threshold of its own, it is said of a flagged text from this score on.
LIKELY = 0.5


@dataclass(frozen=True, slots=True)
class Turn:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """`categories` and `category_scores` carry all of OpenAI's names; untrained ones are False and 0.0.

    `probability`, `threshold` and `language` are those of the most severe window; category scores are the highest of
    any window. `reason` is what flagged: "moderation" for the probability as a whole, or a category or an extension
    with a threshold of its own. `severity` is the largest score in multiples of its threshold: flagged from 1 on.
    """

    flagged: bool
    probability: float
    threshold: float
    categories: dict[str, bool]
    category_scores: dict[str, float]
    extension_scores: dict[str, float] = field(default_factory=dict[str, float])
    reason: str | None = None
    language: Language = "en"
    model: str = ""
    severity: float = 0.0


@dataclass(frozen=True, slots=True)
class WindowOptions:
    """Sizes in characters. A text up to `window_chars` is judged in one piece: some hundred tokens.

    A Chinese character says about what three Latin letters say: in mostly Chinese text all sizes are a third.
    """

    window_chars: int = 400
    stride_chars: int = 200
    joined_chars: int = 1200

    def __post_init__(self) -> None:
        if not 0 < self.stride_chars <= self.window_chars:
            raise ModerationError(
                f"stride_chars is {self.stride_chars}; it must be between 1 and window_chars ({self.window_chars})"
            )


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """From when on a text is flagged: by its probability as a whole, and by single categories besides.

    preset:              chooses the classifier's threshold for the text's language; None: categories alone decide
    threshold:           takes the preset's place, in every language
    category_thresholds: by OpenAI's names or the classifier's extensions; only trained ones
    """

    preset: PresetName | None = DEFAULT_PRESET
    threshold: float | None = None
    category_thresholds: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """`cached_windows`: how many windows of earlier requests keep their scores, known by a hash of their text.

    `most_read`: windows of one text or conversation that a slow classifier reads; of more, those that its quick scores
    find worst. It bounds the time that a megabyte takes.
    """

    input: Sensitivity = Sensitivity()
    output: Sensitivity = Sensitivity()
    windows: WindowOptions = WindowOptions()
    cached_windows: int = 8192
    most_read: int = 64


class Policy:
    """Thread-safe; keeps scores of windows by hash, no text. Raises ModerationError when it cannot judge: then refuse.

    Texts on their own (`judge_texts`) are judged like input.
    """

    def __init__(
        self,
        classifier: TextClassifier,
        options: PolicyOptions = PolicyOptions(),
        *,
        readings: Callable[[str], Sequence[str]] = readings,
    ) -> None:
        """readings: the forms in which a text is judged, itself first."""
        self.options = options
        self._classifier = classifier
        self._readings = readings
        self._cache = _ScoreCache(options.cached_windows)
        self._input = _Side(classifier, options.input)
        self._output = _Side(classifier.for_output, options.output)
        _check_sensitivity("input", options.input, classifier)
        _check_sensitivity("output", options.output, classifier)

    @property
    def model_id(self) -> str:
        """What `/v1/moderations` names as `model`."""
        return f"{self._classifier.name}-{self._classifier.version}"

    @property
    def trained_categories(self) -> tuple[Category, ...]:
        return self._classifier.trained_categories

    @property
    def trained_extensions(self) -> tuple[str, ...]:
        return self._classifier.trained_extensions

    def preset_threshold(self, preset: PresetName, language: Language, direction: Direction = "input") -> float:
        side = self._input if direction == "input" else self._output
        return side.classifier.threshold(preset, language)

    def judge_input(self, turns: Sequence[Turn]) -> Verdict:
        """Judges the new user message and the conversation that carries it, by the rule in the module's docstring."""
        pieces = [piece for text in self._texts_to_judge(turns) for piece in self._pieces(text)]
        return self._most_severe(self._cached_scores(pieces), self._input)

    def judge_texts(self, texts: Sequence[str]) -> list[Verdict]:
        """One verdict a text, each by itself, in order."""
        pieces_of_texts = [self._pieces(text) for text in texts]
        is_short = [len(pieces) <= self.options.most_read for pieces in pieces_of_texts]
        # Short texts share the classifier's batches.
        shared = iter(
            self._scores([p for pieces, short in zip(pieces_of_texts, is_short, strict=True) if short for p in pieces])
        )
        judged = [
            [(piece, next(shared)) for piece in pieces]
            if short
            else list(zip(pieces, self._bounded_scores(pieces), strict=True))
            for pieces, short in zip(pieces_of_texts, is_short, strict=True)
        ]
        return [self._most_severe(scores, self._input) for scores in judged]

    def judge_output(self, context: str, text: str) -> Verdict:
        """Judges a window of generated text.

        context: what stands before it and is not part of the answer, such as the prompt that a completion goes on
        with; "" judges the window alone. It counts as far as the window has room left.
        """
        pieces = self._pieces(text)
        room = self._window_chars(text)[0] - len(text)
        if context and room > 0:
            pieces += self._pieces(context[-room:] + text)
        return self._most_severe(list(zip(pieces, self._scores(pieces, self._output), strict=True)), self._output)

    def _texts_to_judge(self, turns: Sequence[Turn]) -> list[str]:
        texts = [turn.content for turn in turns]
        user_turns = [turn.content for turn in turns if turn.role == "user"]
        if len(user_turns) > 1:
            texts.append("\n".join(user_turns)[-self.options.windows.joined_chars :])
        return texts

    def _pieces(self, text: str) -> list[str]:
        """The windows of every reading of a text; each only once."""
        if not text.strip():
            return []
        windows = (split_windows(reading, self.options.windows) for reading in self._readings(text))
        return list(dict.fromkeys(window for reading in windows for window in reading))

    def _window_chars(self, text: str) -> tuple[int, int]:
        return _window_sizes(text, self.options.windows)

    def _cached_scores(self, pieces: Sequence[str]) -> list[tuple[str, Scores]]:
        keys = {piece: _key(piece) for piece in pieces}
        known = {piece: scores for piece, key in keys.items() if (scores := self._cache.get(key)) is not None}
        missing = [piece for piece in keys if piece not in known]
        for piece, scores in zip(missing, self._bounded_scores(missing), strict=True):
            known[piece] = scores
            self._cache.put(keys[piece], scores)
        return list(known.items())

    def _bounded_scores(self, pieces: Sequence[str]) -> list[Scores]:
        """Scores of one text's windows: of too many, the worst by quick scores are read and the others keep those."""
        most = self.options.most_read
        if len(pieces) <= most:
            return self._scores(pieces)
        found = self._checked(pieces, self._classifier.quick_scores(pieces))
        worst = sorted(range(len(pieces)), key=lambda index: -found[index].probability)[:most]
        for index, scores in zip(worst, self._scores([pieces[index] for index in worst]), strict=True):
            found[index] = scores
        return found

    def _scores(self, pieces: Sequence[str], side: _Side | None = None) -> list[Scores]:
        classifier = (side or self._input).classifier
        return self._checked(pieces, classifier.scores(pieces)) if pieces else []

    def _checked(self, pieces: Sequence[str], found: list[Scores]) -> list[Scores]:
        if len(found) != len(pieces) or not all(_are_probabilities(scores) for scores in found):
            raise ModerationError(f"classifier {self.model_id} did not return one probability for each text")
        return found

    def _most_severe(self, judged: Sequence[tuple[str, Scores]], side: _Side) -> Verdict:
        if not judged:
            return self._verdict("", Scores(0.0), side)
        verdicts = [self._verdict(piece, scores, side) for piece, scores in judged]
        if len(verdicts) == 1:
            return verdicts[0]
        worst = max(verdicts, key=lambda verdict: (verdict.severity, verdict.probability))
        return replace(
            worst,
            categories=_merge(any, [verdict.categories for verdict in verdicts]),
            category_scores=_merge(max, [verdict.category_scores for verdict in verdicts]),
            extension_scores=_merge(max, [verdict.extension_scores for verdict in verdicts]),
        )

    def _verdict(self, piece: str, scores: Scores, side: _Side) -> Verdict:
        language = language_of(piece)
        threshold = side.threshold(language)
        named = {category.value: score for category, score in scores.categories.items()} | dict(scores.extensions)
        own = side.sensitivity.category_thresholds
        severities = {name: named.get(name, 0.0) / own[name] for name in own}
        if threshold is not None:
            severities["moderation"] = scores.probability / threshold
        reason, severity = max(severities.items(), key=lambda item: item[1])
        is_flagged = severity >= 1.0
        return Verdict(
            flagged=is_flagged,
            probability=scores.probability,
            threshold=1.0 if threshold is None else threshold,
            categories=complete_flags(
                {
                    category: score >= own.get(category.value, LIKELY)
                    for category, score in scores.categories.items()
                    if is_flagged
                }
            ),
            category_scores=complete_scores(scores.categories),
            extension_scores={name: float(scores.extensions.get(name, 0.0)) for name in self.trained_extensions},
            reason=reason if is_flagged else None,
            language=language,
            model=self.model_id,
            severity=severity,
        )


@dataclass(frozen=True, slots=True)
class _Side:
    """One direction: who scores, and from when on a score counts."""

    classifier: TextClassifier
    sensitivity: Sensitivity

    def threshold(self, language: Language) -> float | None:
        chosen = self.sensitivity
        if chosen.threshold is not None:
            return chosen.threshold
        return None if chosen.preset is None else self.classifier.threshold(chosen.preset, language)


class _ScoreCache:
    """The scores of the windows that were asked for last. A conversation is sent anew with every turn."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._scores: OrderedDict[bytes, Scores] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Scores | None:
        with self._lock:
            scores = self._scores.get(key)
            if scores is not None:
                self._scores.move_to_end(key)
            return scores

    def put(self, key: bytes, scores: Scores) -> None:
        with self._lock:
            self._scores[key] = scores
            while len(self._scores) > self._size:
                self._scores.popitem(last=False)


def _merge(combine: Callable[[list[T]], T], of_windows: Sequence[Mapping[str, T]]) -> dict[str, T]:
    return {name: combine([values[name] for values in of_windows]) for name in of_windows[0]}


def _key(piece: str) -> bytes:
    # A hash that nobody can find two texts for: a harmless one must not lend its scores to another.
    return hashlib.blake2b(piece.encode("utf-8", "surrogatepass"), digest_size=32).digest()


def _are_probabilities(scores: Scores) -> bool:
    numbers = (scores.probability, *scores.categories.values(), *scores.extensions.values())
    return all(math.isfinite(number) and 0.0 <= number <= 1.0 for number in numbers)


def _check_sensitivity(direction: str, sensitivity: Sensitivity, classifier: TextClassifier) -> None:
    """Raises ModerationError for what could never flag anything, or flags by a name that nothing was trained for."""
    own = sensitivity.category_thresholds
    trained = (*(category.value for category in classifier.trained_categories), *classifier.trained_extensions)
    for name, threshold in (("moderation", sensitivity.threshold), *own.items()):
        if threshold is not None and not 0.0 < threshold <= 1.0:
            message = f"the {name} threshold is {threshold}; it must be above 0 and at most 1 ({direction})"
            raise ModerationError(message)
    untrained = sorted(name for name in own if name not in trained)
    if untrained:
        raise ModerationError(
            f"{direction} has a threshold for {untrained[0]!r}, for which {classifier.name} was not trained; "
            f"it knows {', '.join(trained) or 'no category'}"
        )
    if sensitivity.preset is None and sensitivity.threshold is None and not own:
        raise ModerationError(f"{direction} has neither a preset nor a threshold, so nothing would ever be flagged")


def split_windows(text: str, options: WindowOptions) -> list[str]:
    """Overlapping pieces that cover every character of `text`; an empty or blank text has none."""
    if not text.strip():
        return []
    size, stride = _window_sizes(text, options)
    if len(text) <= size:
        return [text]
    last_start = len(text) - size
    starts = [*range(0, last_start, stride), last_start]
    return [text[start : start + size] for start in starts]


def _window_sizes(text: str, options: WindowOptions) -> tuple[int, int]:
    """Characters of a window and of the step to the next."""
    size, stride = options.window_chars, options.stride_chars
    if len(CJK_CHARACTER.findall(text)) > MOSTLY * len(text):
        return -(-size // CJK_DENSITY), -(-stride // CJK_DENSITY)
    return size, stride


def load_policy(directory: Path | None = None, *, options: PolicyOptions = PolicyOptions()) -> Policy:
    """The shipped classifier (or the one in `directory`) behind a policy. Raises ModerationError, at start only."""
    return Policy(load_classifier(directory), options)
