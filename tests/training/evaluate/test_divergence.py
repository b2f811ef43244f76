"""The KL estimators against the exact value on a tiny vocabulary."""

from __future__ import annotations

import math

import pytest

from training.evaluate.divergence import kl_of_best_of, measure_divergence

pytestmark = pytest.mark.unit

NEW = [0.5, 0.25, 0.125, 0.125]
OLD = [0.25, 0.25, 0.25, 0.25]


def test_both_estimators_are_the_exact_kl_when_every_token_comes_as_often_as_it_should() -> None:
    exact = sum(p * math.log(p / q) for p, q in zip(NEW, OLD, strict=True))
    drawn = [token for token, p in enumerate(NEW) for _ in range(int(p * 8))]
    divergence = measure_divergence(
        [[math.log(NEW[token]) for token in drawn]], [[math.log(OLD[token]) for token in drawn]], seed=0
    )
    assert divergence.per_token.value == pytest.approx(exact)
    assert divergence.per_token_k3.value == pytest.approx(exact)
    assert divergence.per_answer.value == pytest.approx(8 * exact)


def test_k3_is_never_negative_where_k1_is() -> None:
    divergence = measure_divergence([[-2.0, -3.0]], [[-1.0, -1.5]], seed=0)
    assert divergence.per_token.value == pytest.approx(-1.25)
    assert divergence.per_token_k3.value > 0


def test_a_model_does_not_differ_from_itself() -> None:
    divergence = measure_divergence([[-1.0, -2.0], [-0.5]], [[-1.0, -2.0], [-0.5]], seed=0)
    assert (divergence.per_token.value, divergence.per_token_k3.value, divergence.per_answer.value) == (0, 0, 0)


def test_tokens_weigh_the_same_in_long_and_short_answers() -> None:
    divergence = measure_divergence([[0.0] * 9, [0.0]], [[-1.0] * 9, [-2.0]], seed=0)
    assert divergence.per_token.value == pytest.approx(11 / 10)
    assert divergence.per_answer.value == pytest.approx(11 / 2)


def test_scores_of_other_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        measure_divergence([[-1.0, -2.0]], [[-1.0]], seed=0)


def test_best_of_one_moves_nothing() -> None:
    assert kl_of_best_of(1) == 0
    assert kl_of_best_of(4) == pytest.approx(math.log(4) - 0.75)
