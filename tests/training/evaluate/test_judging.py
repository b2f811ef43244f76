"""Win rates, best-of-N and disagreement, against hand-made scores and brute force."""

from __future__ import annotations

import itertools
import random

import pytest

from training.evaluate.judging import best_of_curve, best_of_index, disagreement, reward_gain, win_rate

pytestmark = pytest.mark.unit


def test_wins_are_counted_pair_by_pair_and_ties_half() -> None:
    assert win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0]).value == pytest.approx(2.5 / 4)


def test_the_other_way_round_the_win_rate_is_one_minus() -> None:
    ours, theirs = [0.3, 0.1, 0.5, 0.5], [0.2, 0.4, 0.5, 0.1]
    assert win_rate(ours, theirs).value == pytest.approx(1 - win_rate(theirs, ours).value)


def test_pairs_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        win_rate([1.0, 2.0], [1.0])


def test_a_gain_is_paired_so_a_shared_difficulty_cancels() -> None:
    difficulty = [random.Random(0).uniform(-50, 50) for _ in range(30)]
    gain = reward_gain([value + 1 for value in difficulty], difficulty, seed=0)
    assert gain.value == pytest.approx(1)
    assert gain.low == pytest.approx(1)


def test_judges_that_name_different_winners_disagree() -> None:
    ours, theirs = [1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 0.0, 1.0]
    flipped = ([1.0, 1.0, 0.0, 1.0], [0.0, 2.0, 1.0, 1.0])
    assert disagreement((ours, theirs), flipped).value == 0.25


def test_the_best_of_curve_is_the_mean_over_all_choices() -> None:
    rng = random.Random(1)
    chosen_by = [[rng.random() for _ in range(5)] for _ in range(3)]
    judged = [[rng.random() for _ in range(5)] for _ in range(3)]
    curve = best_of_curve(judged, chosen_by)
    for k in range(1, 6):
        found = [
            values[max(subset, key=lambda index: chooser[index])]
            for values, chooser in zip(judged, chosen_by, strict=True)
            for subset in itertools.combinations(range(5), k)
        ]
        assert curve[k - 1] == pytest.approx(sum(found) / len(found))


def test_more_answers_never_lower_the_choosers_own_score() -> None:
    rng = random.Random(2)
    scores = [[rng.gauss(0, 1) for _ in range(8)] for _ in range(20)]
    curve = best_of_curve(scores, scores)
    assert curve == sorted(curve)
    assert curve[-1] == pytest.approx(sum(map(max, scores)) / 20)


def test_of_equal_scores_the_first_is_taken() -> None:
    assert best_of_index([1.0, 3.0, 3.0]) == 1
