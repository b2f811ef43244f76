"""A classifier for tests of the policy: the probability of a text is that of the most dangerous word in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moderation.categories import Category
from moderation.classifier import Scores
from moderation.presets import Language, PresetName

THRESHOLDS: Mapping[PresetName, float] = {"strict": 0.3, "balanced": 0.5, "lenient": 0.8}


class WordClassifier:
    """Thresholds are those of THRESHOLDS, a tenth lower for Chinese. `categories` and `extensions` score words too."""

    name = "words"
    version = "test"

    def __init__(
        self,
        probability_of_word: Mapping[str, float],
        categories: Mapping[Category, Mapping[str, float]] | None = None,
        extensions: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        self._probability_of_word = probability_of_word
        self._categories = categories or {}
        self._extensions = extensions or {}
        self.seen: list[str] = []

    @property
    def trained_categories(self) -> tuple[Category, ...]:
        return tuple(self._categories)

    @property
    def trained_extensions(self) -> tuple[str, ...]:
        return tuple(self._extensions)

    @property
    def for_output(self) -> WordClassifier:
        return self

    def threshold(self, preset: PresetName, language: Language) -> float:
        return THRESHOLDS[preset] - 0.1 * (language == "zh")

    def scores(self, texts: Sequence[str]) -> list[Scores]:
        self.seen += texts
        return [
            Scores(
                _highest(self._probability_of_word, text),
                {category: _highest(words, text) for category, words in self._categories.items()},
                {name: _highest(words, text) for name, words in self._extensions.items()},
            )
            for text in texts
        ]

    def quick_scores(self, texts: Sequence[str]) -> list[Scores]:
        return WordClassifier.scores(self, texts)


class BrokenClassifier(WordClassifier):
    """Answers with whatever it was given."""

    def __init__(self, answer: Sequence[float | Scores]) -> None:
        super().__init__({})
        self._answer = [one if isinstance(one, Scores) else Scores(one) for one in answer]

    def scores(self, texts: Sequence[str]) -> list[Scores]:
        return self._answer


def _highest(probability_of_word: Mapping[str, float], text: str) -> float:
    return max([0.0, *(probability for word, probability in probability_of_word.items() if word in text)])
