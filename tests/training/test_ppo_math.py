"""Each function against values worked out by hand or by brute force, and against what lies under the mask."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from training.ppo_math import (
    KlEstimator,
    chosen_logprobs,
    clip_fraction,
    entropy_of,
    estimate_advantages,
    estimate_kl,
    exact_kl,
    explained_variance,
    group_advantages,
    judged_scores,
    last_response_column,
    masked_mean,
    masked_moments,
    masked_sum,
    masked_whiten,
    policy_losses,
    token_rewards,
    value_losses,
)

pytestmark = pytest.mark.unit

CLIP = 0.2
# Prompts of 2, 1 and 3 tokens, answers of 3, 5 and 1, and padding behind them.
IS_RESPONSE = torch.tensor(
    [
        [False, False, True, True, True, False],
        [False, True, True, True, True, True],
        [False, False, False, True, False, False],
    ]
)


def random_like_mask(seed: int) -> Tensor:
    return torch.randn(IS_RESPONSE.shape, generator=torch.Generator().manual_seed(seed))


def spoil(values: Tensor, garbage: float) -> Tensor:
    return torch.where(IS_RESPONSE, values, garbage)


def with_pad_columns(values: Tensor, count: int, fill: float) -> Tensor:
    return torch.cat((values, torch.full((values.shape[0], count), fill).to(values.dtype)), dim=1)


class TestMasks:
    def test_mean_is_over_true_positions_only(self) -> None:
        values = torch.tensor([1.0, 100.0, 3.0])
        assert masked_mean(values, torch.tensor([True, False, True])) == 2.0

    def test_nan_under_the_mask_reaches_neither_the_sum_nor_its_gradient(self) -> None:
        values = torch.tensor([1.0, math.nan], requires_grad=True)
        total = masked_sum(values, torch.tensor([True, False]))
        total.backward()
        assert total == 1.0
        assert values.grad is not None
        assert values.grad.tolist() == [1.0, 0.0]

    def test_a_mask_without_a_true_position_is_refused(self) -> None:
        nowhere = torch.zeros(3, dtype=torch.bool)
        with pytest.raises(ValueError, match="False everywhere"):
            masked_mean(torch.ones(3), nowhere)
        with pytest.raises(ValueError, match="False everywhere"):
            masked_whiten(torch.ones(3), nowhere)

    def test_shapes_that_differ_are_refused_and_named(self) -> None:
        with pytest.raises(ValueError, match=r"values \(2, 3\), mask \(3,\)"):
            masked_sum(torch.ones(2, 3), torch.ones(3, dtype=torch.bool))

    def test_whitened_values_have_mean_0_and_variance_1_whatever_is_masked(self) -> None:
        values = random_like_mask(0) * 7 + 3
        whitened = masked_whiten(spoil(values, 1e6), IS_RESPONSE)
        chosen = whitened[IS_RESPONSE]
        assert chosen.mean().abs() < 1e-6
        assert chosen.var(correction=0) == pytest.approx(1.0, abs=1e-6)
        assert whitened[~IS_RESPONSE].abs().max() == 0
        assert torch.equal(whitened, masked_whiten(spoil(values, math.nan), IS_RESPONSE))

    def test_whitening_one_lone_value_gives_0(self) -> None:
        assert masked_whiten(torch.tensor([5.0, 9.0]), torch.tensor([True, False])).tolist() == [0.0, 0.0]

    def test_two_shares_whitened_by_their_added_moments_equal_the_whole(self) -> None:
        values = random_like_mask(1)
        shares = ((values[:1], IS_RESPONSE[:1]), (values[1:], IS_RESPONSE[1:]))
        moments = masked_moments(*shares[0]) + masked_moments(*shares[1])
        parts = [masked_whiten(share, mask, moments) for share, mask in shares]
        assert torch.allclose(torch.cat(parts), masked_whiten(values, IS_RESPONSE), atol=1e-7)


class TestDistributions:
    def test_logprobs_are_those_of_the_tempered_distribution(self) -> None:
        logits = torch.tensor([[0.0, math.log(3.0)]])
        assert chosen_logprobs(logits, torch.tensor([1])).exp() == pytest.approx(0.75)
        # Temperature 1/2 squares the odds: 1 to 9.
        assert chosen_logprobs(logits, torch.tensor([1]), 0.5).exp() == pytest.approx(0.9)

    def test_entropy_of_a_uniform_and_of_a_certain_distribution(self) -> None:
        logits = torch.stack((torch.zeros(8), torch.tensor([0.0] + [-math.inf] * 7)))
        assert entropy_of(logits).tolist() == pytest.approx([math.log(8), 0.0])

    @pytest.mark.parametrize("temperature", [0.7, 1.0])
    def test_k1_and_k3_equal_the_exact_kl_in_expectation(self, temperature: float) -> None:
        """The expectation is taken exactly: every token of a tiny vocabulary, weighted by its probability."""
        generator = torch.Generator().manual_seed(3)
        logits, reference = torch.randn(2, 5, 11, generator=generator) * 1.5
        exact = exact_kl(logits, reference, temperature)
        probabilities = (logits / temperature).softmax(-1)
        every_id = torch.arange(11).expand(5, 11)
        logprobs, reference_logprobs = (
            chosen_logprobs(item.unsqueeze(1).expand(5, 11, 11), every_id, temperature) for item in (logits, reference)
        )
        for estimator in ("k1", "k3"):
            expected = (probabilities * estimate_kl(logprobs, reference_logprobs, estimator)).sum(-1)
            assert torch.allclose(expected, exact, atol=1e-5)
        assert exact.min() > 0.1

    @pytest.mark.parametrize("estimator", ["k2", "k3"])
    def test_k2_and_k3_are_never_negative_and_0_for_equal_distributions(self, estimator: KlEstimator) -> None:
        logprobs = random_like_mask(4) * 30
        assert estimate_kl(logprobs, random_like_mask(5) * 30, estimator).min() >= 0
        assert estimate_kl(logprobs, logprobs, estimator).abs().max() == 0

    def test_k3_stays_finite_for_a_token_that_the_policy_almost_lost(self) -> None:
        assert torch.isfinite(estimate_kl(torch.tensor([-500.0]), torch.tensor([0.0]), "k3")).all()

    def test_exact_kl_of_two_coins(self) -> None:
        half, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        assert exact_kl(half, quarter) == pytest.approx(0.5 * math.log(2.0) + 0.5 * math.log(2.0 / 3.0))


class TestRewards:
    def test_score_lies_on_the_last_real_token_of_answers_of_unequal_length(self) -> None:
        scores = torch.tensor([1.0, 2.0, 3.0])
        rewards = token_rewards(scores, torch.zeros_like(IS_RESPONSE, dtype=torch.float32), IS_RESPONSE, 0.1)
        expected = torch.zeros(3, 6)
        expected[0, 4], expected[1, 5], expected[2, 3] = 1.0, 2.0, 3.0
        assert torch.equal(rewards, expected)
        assert last_response_column(IS_RESPONSE).tolist() == [4, 5, 3]

    def test_kl_is_taken_off_at_sampled_tokens_only(self) -> None:
        rewards = token_rewards(torch.zeros(3), torch.ones(3, 6), IS_RESPONSE, 0.5)
        assert torch.equal(rewards, torch.where(IS_RESPONSE, -0.5, 0.0))

    def test_a_row_without_a_sampled_token_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no sampled token"):
            last_response_column(torch.zeros(1, 4, dtype=torch.bool))

    def test_missing_end_costs_after_the_cut(self) -> None:
        scores, has_end = torch.tensor([9.0, 9.0, -9.0]), torch.tensor([True, False, True])
        judged = judged_scores(scores, has_end, missing_end_penalty=1.5, clip=4.0)
        assert judged.tolist() == [4.0, 2.5, -4.0]
        assert judged_scores(scores, has_end, missing_end_penalty=0.0, clip=None).tolist() == [9.0, 9.0, -9.0]


def brute_force_advantages(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The definition: a lambda-weighted sum of surprises, quadratic in the length."""
    after = [*values[1:], 0.0]
    surprises = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, after, strict=True)]
    return [
        sum((gamma * lam) ** (j - i) * surprises[j] for j in range(i, len(surprises))) for i in range(len(surprises))
    ]


class TestAdvantages:
    @pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.97, 0.5), (1.0, 0.0)])
    def test_gae_equals_brute_force_row_by_row(self, gamma: float, lam: float) -> None:
        rewards, values = random_like_mask(6), random_like_mask(7)
        found = estimate_advantages(spoil(rewards, 1e4), spoil(values, 1e4), IS_RESPONSE, gamma, lam)
        for row, mask in enumerate(IS_RESPONSE):
            expected = brute_force_advantages(rewards[row][mask].tolist(), values[row][mask].tolist(), gamma, lam)
            assert found.advantages[row][mask].tolist() == pytest.approx(expected, abs=1e-5)
        assert found.advantages[~IS_RESPONSE].abs().max() == 0
        assert torch.allclose(found.returns, torch.where(IS_RESPONSE, found.advantages + values, 0.0), atol=1e-6)

    def test_with_lambda_and_gamma_1_the_return_is_the_sum_of_rewards_to_come(self) -> None:
        rewards = random_like_mask(8)
        found = estimate_advantages(rewards, random_like_mask(9), IS_RESPONSE, 1.0, 1.0)
        to_come = torch.where(IS_RESPONSE, rewards, 0.0).flip(1).cumsum(1).flip(1)
        assert torch.allclose(found.returns, torch.where(IS_RESPONSE, to_come, 0.0), atol=1e-5)

    def test_group_advantages_have_mean_0_within_each_group(self) -> None:
        found = group_advantages(torch.tensor([1.0, 2.0, 3.0, 7.0, 7.0, 7.0]), 3)
        third = 1 / (2 / 3) ** 0.5
        assert found.tolist() == pytest.approx([-third, 0.0, third, 0.0, 0.0, 0.0], abs=1e-5)
        plain = group_advantages(torch.tensor([1.0, 2.0, 3.0]), 3, divide_by_deviation=False)
        assert plain.tolist() == [-1.0, 0.0, 1.0]

    @pytest.mark.parametrize(("count", "size"), [(4, 1), (5, 2)])
    def test_groups_of_one_or_of_uneven_size_are_refused(self, count: int, size: int) -> None:
        with pytest.raises(ValueError, match="do not form groups"):
            group_advantages(torch.ones(count), size)


class TestLosses:
    def test_policy_loss_by_hand(self) -> None:
        """Ratios 1, 1.5, 0.5 under advantages of both signs: the clip bites only where it makes the objective worse."""
        logprobs = torch.tensor([[1.0, 1.5, 0.5, 1.5, 0.5]]).log()
        advantages = torch.tensor([[2.0, 2.0, 2.0, -2.0, -2.0]])
        losses = policy_losses(logprobs, torch.zeros(1, 5), advantages, torch.ones(1, 5, dtype=torch.bool), CLIP)
        assert losses[0].tolist() == pytest.approx([-2.0, -2.4, -1.0, 3.0, 1.6])

    def test_at_equal_logprobs_the_gradient_is_the_policy_gradient(self) -> None:
        logprobs = random_like_mask(10).requires_grad_()
        advantages = random_like_mask(11)
        policy_losses(logprobs, logprobs.detach(), advantages, IS_RESPONSE, CLIP).sum().backward()
        assert logprobs.grad is not None
        assert torch.allclose(logprobs.grad, torch.where(IS_RESPONSE, -advantages, 0.0))

    def test_value_loss_by_hand(self) -> None:
        """Return 1: a value that moved past the clip is judged by the worse of the two errors."""
        values, old = torch.tensor([[0.5, 1.0, 0.0]]), torch.tensor([[0.4, 0.5, 0.5]])
        losses = value_losses(values, old, torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool), CLIP)
        assert losses[0].tolist() == pytest.approx([0.5 * 0.5**2, 0.5 * 0.3**2, 0.5 * 1.0**2])

    def test_clip_fraction_counts_ratios_outside(self) -> None:
        logprobs = torch.tensor([[1.1, 1.3, 0.7, 5.0]]).log()
        mask = torch.tensor([[True, True, True, False]])
        assert clip_fraction(logprobs, torch.zeros(1, 4), mask, CLIP) == pytest.approx(2 / 3)

    def test_explained_variance_of_perfect_constant_and_masked_values(self) -> None:
        returns = random_like_mask(12)
        assert explained_variance(spoil(returns, 1e5), returns, IS_RESPONSE) == pytest.approx(1.0)
        assert explained_variance(torch.zeros(3, 6), spoil(returns, 1e5), IS_RESPONSE) == pytest.approx(0.0, abs=1e-6)
        assert explained_variance(returns, torch.ones(3, 6), IS_RESPONSE) == 0.0


LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


@pytest.mark.parametrize("loss_function", [policy_losses, value_losses])
@pytest.mark.parametrize("garbage", [0.0, 1e9, math.nan, math.inf])
def test_what_is_masked_changes_neither_a_loss_nor_its_gradient(loss_function: LossFunction, garbage: float) -> None:
    first, second, third = (random_like_mask(seed) for seed in (13, 14, 15))
    clean = first.clone().requires_grad_()
    loss_function(clean, second, third, IS_RESPONSE, CLIP).sum().backward()
    spoiled = spoil(first, garbage).requires_grad_()
    losses = loss_function(spoiled, spoil(second, garbage), spoil(third, garbage), IS_RESPONSE, CLIP)
    losses.sum().backward()
    assert losses[~IS_RESPONSE].abs().max() == 0
    assert clean.grad is not None
    assert spoiled.grad is not None
    assert torch.equal(clean.grad, spoiled.grad)


@pytest.mark.parametrize("fill", [0.0, 123.0, math.nan])
def test_pad_columns_change_nothing_from_scores_to_gradients(fill: float) -> None:
    """The whole chain of an update on the padded layout, with 4 more columns of garbage."""
    logprobs, old, reference, values, new_values = (random_like_mask(seed) for seed in range(20, 25))
    scores, has_end = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([True, False, True])

    def chain(extra: int) -> tuple[Tensor, Tensor, Tensor]:
        mask = with_pad_columns(IS_RESPONSE, extra, False)
        new, was, ref, value, new_value = (
            with_pad_columns(item, extra, fill) for item in (logprobs, old, reference, values, new_values)
        )
        new.requires_grad_()
        new_value.requires_grad_()
        judged = judged_scores(scores, has_end, missing_end_penalty=1.0, clip=5.0)
        rewards = token_rewards(judged, estimate_kl(was, ref, "k1"), mask, 0.1)
        found = estimate_advantages(rewards, value, mask, 1.0, 0.95)
        whitened = masked_whiten(found.advantages, mask)
        loss = masked_mean(policy_losses(new, was, whitened, mask, CLIP), mask)
        loss = loss + masked_mean(value_losses(new_value, value, found.returns, mask, CLIP), mask)
        loss.backward()
        assert new.grad is not None
        assert new_value.grad is not None
        return loss.detach(), new.grad[:, :6], new_value.grad[:, :6]

    plain, padded = chain(0), chain(4)
    # Not bit-equal: a sum over another shape adds in another order.
    torch.testing.assert_close(padded, plain, rtol=1e-6, atol=1e-7)
