"""A classifier for tests of the policy: the probability of a text is that of the most dangerous word in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moderation.categories import Category


class WordClassifier:
    name = "words"
    version = "test"
    threshold = 0.5
    trained_categories: tuple[Category, ...] = ()

    def __init__(self, probability_of_word: Mapping[str, float]) -> None:
        self._probability_of_word = probability_of_word
        self.seen: list[str] = []

    def probabilities(self, texts: Sequence[str]) -> list[float]:
        self.seen += texts
        return [max([0.0, *(p for word, p in self._probability_of_word.items() if word in t)]) for t in texts]


class BrokenClassifier(WordClassifier):
    """Answers with whatever it was given."""

    def __init__(self, answer: Sequence[float]) -> None:
        super().__init__({})
        self._answer = list(answer)

    def probabilities(self, texts: Sequence[str]) -> list[float]:
        return self._answer
