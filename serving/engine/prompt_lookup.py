"""Guesses at what a sequence says next, from where it has said the same before: quotes, lists, code, names.

The engine computes a guess in the step that computes the token before it, draws every token as it would without, and
keeps what it drew up to the first token that was guessed wrong. So guesses change how many tokens a step gives, never
which ones: drawing first and comparing is rejection sampling with a draft that is sure of itself (arXiv:2211.17192,
section 2.3, with all of q on one token).
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_GUESS = 4
_NGRAM_SIZES = (3, 2)  # the longer one is the better witness
# Guessed tokens cost rows of the step: after this many, a sequence whose guesses are mostly wrong makes no more.
_NUM_TRIED = 32
_LEAST_RIGHT = 0.3


class PromptLookup:
    """The guesses of one sequence, whose ids only grow."""

    def __init__(self) -> None:
        self.num_guessed = 0
        self.num_right = 0
        self._next_of: dict[tuple[int, ...], int] = {}  # after which n-gram comes the id at which position, latest
        self._num_indexed = 0

    @property
    def pays(self) -> bool:
        return self.num_guessed < _NUM_TRIED or self.num_right >= _LEAST_RIGHT * self.num_guessed

    def guess(self, ids: Sequence[int], count: int) -> list[int]:
        """Up to `count` ids that may come after `ids`."""
        if count < 1 or not self.pays:
            return []
        self._index(ids)
        for size in _NGRAM_SIZES:
            position = self._next_of.get(tuple(ids[-size:]))
            if position is not None:
                return list(ids[position : position + count])
        return []

    def learn(self, num_guessed: int, num_right: int) -> None:
        """How a guess turned out."""
        self.num_guessed += num_guessed
        self.num_right += num_right

    def _index(self, ids: Sequence[int]) -> None:
        for position in range(self._num_indexed, len(ids)):
            for size in _NGRAM_SIZES:
                if position >= size:
                    self._next_of[tuple(ids[position - size : position])] = position
        self._num_indexed = len(ids)
