"""A classifier for tests of the policy: the probability of a text is that of the most dangerous word in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moderation.categories import Category
from moderation.classifier import Scores
from moderation.presets import Language, PresetName


class WordClassifier:
    name = "words"
    version = "test"
    trained_categories: tuple[Category, ...] = ()
    trained_extensions: tuple[str, ...] = ()

    def __init__(self, probability_of_word: Mapping[str, float]) -> None:
        self._probability_of_word = probability_of_word
        self.seen: list[str] = []

    def threshold(self, preset: PresetName, language: Language) -> float:
        return 0.5

    def scores(self, texts: Sequence[str]) -> list[Scores]:
        self.seen += texts
        return [Scores(max([0.0, *(p for word, p in self._probability_of_word.items() if word in t)])) for t in texts]


class BrokenClassifier(WordClassifier):
    """Answers with whatever it was given."""

    def __init__(self, answer: Sequence[float]) -> None:
        super().__init__({})
        self._answer = list(answer)

    def scores(self, texts: Sequence[str]) -> list[Scores]:
        return [Scores(probability) for probability in self._answer]
