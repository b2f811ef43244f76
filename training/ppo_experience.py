"""What PPO makes of an iteration's answers once every model has looked at them. Tensors only."""

from __future__ import annotations

from torch import Tensor

from training.experience import CriticTargets, Experience
from training.ppo_math import (
    estimate_advantages,
    estimate_kl,
    explained_variance,
    judged_scores,
    masked_mean,
    masked_sum,
    masked_whiten,
    token_rewards,
)
from training.rollout import Trajectory
from training.settings import PpoSettings


def make_experience(
    trajectory: Trajectory,
    *,
    scores: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor,
    old_values: Tensor,
    kl_coefficient: float,
    settings: PpoSettings,
) -> Experience:
    """Rewards, advantages and returns. scores: (rows,); the others (rows, length), float32, 0 off the response."""
    is_response = trajectory.is_response
    judged = judged_scores(
        scores, trajectory.has_end, missing_end_penalty=settings.missing_end_penalty, clip=settings.reward_clip
    )
    kl = estimate_kl(old_logprobs, reference_logprobs, "k1")
    rewards = token_rewards(judged, kl, is_response, kl_coefficient)
    found = estimate_advantages(rewards, old_values, is_response, settings.gamma, settings.lam)
    return Experience(
        trajectory=trajectory,
        scores=scores,
        old_logprobs=old_logprobs,
        reference_logprobs=reference_logprobs,
        advantages=masked_whiten(found.advantages, is_response),
        critic=CriticTargets(old_values, found.returns),
    )


def describe(experience: Experience) -> dict[str, float]:
    """What to log of an iteration's answers.

    kl_per_token, kl_per_answer: to the reference, by k3, in nats. entropy: minus the mean log-probability of what was
    sampled, which is its unbiased estimate. engine_mismatch: mean distance between the engine's log-probability of a
    token and the training forward's. explained_variance: of the returns, by the values the advantages were made with.
    """
    trajectory, mask = experience.trajectory, experience.trajectory.is_response
    kl = estimate_kl(experience.old_logprobs, experience.reference_logprobs, "k3")
    mismatch = (trajectory.engine_logprobs - experience.old_logprobs).abs()
    values = {
        "reward": float(experience.scores.mean()),
        "kl_per_token": float(masked_mean(kl, mask)),
        "kl_per_answer": float(masked_sum(kl, mask)) / trajectory.num_rows,
        "entropy": -float(masked_mean(experience.old_logprobs, mask)),
        "answer_tokens": float(trajectory.response_lengths().float().mean()),
        "finished": float(trajectory.has_end.float().mean()),
        "engine_mismatch": float(masked_mean(mismatch, mask)),
    }
    if experience.critic is not None:
        critic = experience.critic
        values["explained_variance"] = float(explained_variance(critic.old_values, critic.returns, mask))
    return values
