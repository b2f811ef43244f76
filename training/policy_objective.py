"""The objectives of one update on an iteration's answers: the policy's clipped loss, and the critic's.

Both are sums over sampled tokens with the number of tokens as weight, for `training.loop.accumulate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from training.experience import Experience, UpdatePlan, place_responses
from training.ppo_math import estimate_kl, masked_sum, policy_losses, value_losses
from training.roles import Critic, LanguageModel


class OverAnswers:
    """What both objectives share: a batch is the indices of some answers, its weight their sampled tokens."""

    def __init__(self, experience: Experience, plan: UpdatePlan, seed: int) -> None:
        """seed: of the order of passes; differs between iterations."""
        self._experience, self._plan, self._seed = experience, plan, seed

    def micro_batches(self, step: int) -> Sequence[Tensor]:
        """step: of this iteration, from 0."""
        return self._plan.of_update(step, self._seed)

    def weight(self, batch: Tensor) -> float:
        return float(self._experience.trajectory.is_response[batch].sum())

    def num_tokens(self, batch: Tensor) -> int:
        return int(self._experience.trajectory.is_token[batch].sum())


class PolicyObjective(OverAnswers):
    """Clipped surrogate loss, minus an entropy bonus, plus (for GRPO) the KL to the reference as a loss."""

    def __init__(
        self,
        policy: LanguageModel,
        experience: Experience,
        plan: UpdatePlan,
        seed: int,
        *,
        clip: float,
        entropy_coefficient: float = 0.0,
        kl_loss_coefficient: float = 0.0,
    ) -> None:
        super().__init__(experience, plan, seed)
        self._policy, self._clip = policy, clip
        self._entropy_coefficient, self._kl_loss_coefficient = entropy_coefficient, kl_loss_coefficient

    def loss(self, batch: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        experience = self._experience
        forward = experience.trajectory.batch(batch)
        mask, width = forward.is_target, forward.input_ids.shape[1]
        old, advantages, reference = (
            tensor[batch, :width]
            for tensor in (experience.old_logprobs, experience.advantages, experience.reference_logprobs)
        )
        flat, entropies = self._policy.logprobs_and_entropy(forward, with_entropy=self._entropy_coefficient > 0)
        new = place_responses(mask, flat.cpu())
        loss = policy_losses(new, old, advantages, mask, self._clip).sum()
        if entropies is not None:
            loss = loss - self._entropy_coefficient * entropies.sum().cpu()
        if self._kl_loss_coefficient:
            loss = loss + self._kl_loss_coefficient * masked_sum(estimate_kl(new, reference, "k3"), mask)
        return loss, _policy_values(new.detach(), old, mask, self._clip)


class CriticObjective(OverAnswers):
    """Clipped squared error of the critic's estimates."""

    def __init__(self, critic: Critic, experience: Experience, plan: UpdatePlan, seed: int, *, clip: float) -> None:
        super().__init__(experience, plan, seed)
        self._critic, self._clip = critic, clip

    def loss(self, batch: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        experience = self._experience
        assert experience.critic is not None
        forward = experience.trajectory.batch(batch)
        mask, width = forward.is_target, forward.input_ids.shape[1]
        old, returns = (tensor[batch, :width] for tensor in (experience.critic.old_values, experience.critic.returns))
        values = place_responses(mask, self._critic.values(forward).cpu())
        return value_losses(values, old, returns, mask, self._clip).sum(), {}


def _policy_values(new: Tensor, old: Tensor, mask: Tensor, clip: float) -> dict[str, float]:
    """Sums over sampled tokens, to be divided by their number: the share clipped, and KL(old || new) by k3."""
    log_ratio = torch.where(mask, new - old, 0.0)
    outside = ((log_ratio.exp() - 1.0).abs() > clip) & mask
    # k3 takes its samples from the first argument's distribution: they were drawn from the old policy.
    return {"clip_fraction": float(outside.sum()), "step_kl": float(masked_sum(estimate_kl(old, new, "k3"), mask))}
