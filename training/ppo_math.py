"""The arithmetic of PPO, GRPO and their masks: pure functions on tensors, no model, device, file or loop.

One layout throughout: (rows, length), one sample a row, padded on the right. A value stands at the token it belongs to:
the log-probability of a token, and the critic's estimate before it, are at that token's own column. `is_response` is
True on sampled tokens, False on the prompt and on padding; what lies under False never enters a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

KlEstimator: TypeAlias = Literal["k1", "k2", "k3"]
_WHITEN_EPS = 1e-8
# exp(20) is about 5e8: a ratio that large is clipped anyway, and its square still fits float32.
MAX_LOG_RATIO = 20.0


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum where mask is True, a scalar. values: any shape, float; mask: same shape, bool.

    What lies under False may be anything, NaN included: it is replaced, not multiplied by zero, so that it reaches
    neither the sum nor the gradient.
    """
    _require_same_shape(values=values, mask=mask)
    return torch.where(mask, values, 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean where mask is True, a scalar. Raises ValueError if the mask is True nowhere."""
    count = int(mask.sum())
    if count == 0:
        raise ValueError("the mask is False everywhere; a mean needs at least one value")
    return masked_sum(values, mask) / count


def masked_moments(values: Tensor, mask: Tensor) -> Tensor:
    """(3,) float64: count, sum and sum of squares where mask is True.

    Moments of several processes add up, so that each can whiten its share by the statistics of all.
    """
    _require_same_shape(values=values, mask=mask)
    chosen = torch.where(mask, values.detach().double(), 0.0)
    return torch.stack((mask.sum().double(), chosen.sum(), chosen.square().sum()))


def masked_whiten(values: Tensor, mask: Tensor, moments: Tensor | None = None) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over the True positions; 0 elsewhere. Same shape and dtype as values.

    moments: of `masked_moments`, when values are only a part of what is to be whitened together.
    The variance is that of the population (divided by n): one lone value becomes 0, not NaN.
    """
    count, total, squares = masked_moments(values, mask) if moments is None else moments
    if count == 0:
        raise ValueError("the mask is False everywhere; whitening needs at least one value")
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0.0)
    whitened = (values.double() - mean) * torch.rsqrt(variance + _WHITEN_EPS)
    return torch.where(mask, whitened, 0.0).to(values.dtype)


def chosen_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each id. logits: (..., vocabulary) any float; ids: (...) int64. Returns (...) float32.

    The temperature divides the logits: the distribution is the one that was sampled from.
    """
    scaled = logits.float() / temperature
    return scaled.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def entropy_of(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of each distribution. logits: (..., vocabulary) any float. Returns (...) float32, >= 0."""
    logprobs = (logits.float() / temperature).log_softmax(-1)
    # Where a token is impossible, 0 * -inf is 0 here and not NaN.
    return -torch.where(logprobs.isneginf(), 0.0, logprobs.exp() * logprobs).sum(-1)


def exact_kl(logits: Tensor, reference_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || reference) in nats over the whole vocabulary. Both (..., vocabulary) any float. Returns (...) float32."""
    logprobs = (logits.float() / temperature).log_softmax(-1)
    reference = (reference_logits.float() / temperature).log_softmax(-1)
    return (logprobs.exp() * (logprobs - reference)).sum(-1)


def estimate_kl(logprobs: Tensor, reference_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """KL(policy || reference) in nats at each token that the policy sampled. All tensors of one shape, float32.

    k1: log ratio; unbiased, may be negative.          k2: half its square; biased, >= 0, low variance.
    k3: exp(-log ratio) - 1 + log ratio; unbiased and >= 0, its mean is the exact KL.
    Source: J. Schulman, "Approximating KL divergence" (2020), http://joschu.net/blog/kl-approx.html.
    """
    _require_same_shape(logprobs=logprobs, reference_logprobs=reference_logprobs)
    log_ratio = logprobs - reference_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    # Clamped on the side where exp would overflow; there the estimate is huge either way.
    return torch.expm1((-log_ratio).clamp(max=MAX_LOG_RATIO)) + log_ratio


def judged_scores(scores: Tensor, has_end: Tensor, *, missing_end_penalty: float, clip: float | None) -> Tensor:
    """The reward model's scores as PPO uses them: cut to [-clip, clip], then the penalty for a missing end.

    scores: (rows,) float32, normalised; has_end: (rows,) bool, True where the answer ended by itself, False where it
    was cut off. The penalty comes after the cut: an answer without an end must always cost.
    Source of the penalty: TRL's missing_eos_penalty; arXiv:2009.01325 (appendix B.1) set a fixed score instead.
    """
    _require_same_shape(scores=scores, has_end=has_end)
    cut = scores if clip is None else scores.clamp(-clip, clip)
    return torch.where(has_end, cut, cut - missing_end_penalty)


def last_response_column(is_response: Tensor) -> Tensor:
    """(rows,) int64, the column of each row's last sampled token. Raises ValueError if a row has none."""
    if not bool(is_response.any(1).all()):
        raise ValueError("a row has no sampled token; every answer has at least its end")
    columns = torch.arange(is_response.shape[1], device=is_response.device)
    return torch.where(is_response, columns, -1).amax(1)


def token_rewards(scores: Tensor, kl: Tensor, is_response: Tensor, kl_coefficient: float) -> Tensor:
    """Minus the KL penalty at every sampled token, plus the score at the last one. (rows, length) float32, 0 elsewhere.

    scores: (rows,) float32; kl: (rows, length) float32, nats at each token; is_response: (rows, length) bool.
    The last real token is the end of turn where the answer has one, never the padding behind it.
    Source: arXiv:2203.02155, section 3.5; arXiv:1909.08593, equation 2.
    """
    _require_same_shape(kl=kl, is_response=is_response)
    rewards = torch.where(is_response, -kl_coefficient * kl, 0.0)
    at_last = torch.zeros_like(rewards).scatter_(1, last_response_column(is_response).unsqueeze(1), scores[:, None])
    return rewards + at_last


@dataclass(frozen=True, slots=True)
class Advantages:
    """Both (rows, length) float32, 0 off the response. returns: what the critic is to predict."""

    advantages: Tensor
    returns: Tensor


def estimate_advantages(rewards: Tensor, values: Tensor, is_response: Tensor, gamma: float, lam: float) -> Advantages:
    """Generalised advantage estimation over padded responses.

    rewards:     (rows, length) float32, per token, KL penalty already subtracted
    values:      (rows, length) float32, critic's estimate before each token
    is_response: (rows, length) bool, True on sampled tokens
    Raises ValueError if shapes differ.
    Source: arXiv:1506.02438, section 3. The episode ends at the last response token: no value is taken from beyond it,
    also where an answer was cut off.
    """
    _require_same_shape(rewards=rewards, values=values, is_response=is_response)
    values = torch.where(is_response, values, 0.0)  # the token after the last one is worth 0
    rewards = torch.where(is_response, rewards, 0.0)
    advantages = torch.zeros_like(rewards)
    carry = torch.zeros_like(rewards[:, 0])
    value_after = torch.zeros_like(carry)
    for column in reversed(range(rewards.shape[1])):
        surprise = rewards[:, column] + gamma * value_after - values[:, column]
        carry = torch.where(is_response[:, column], surprise + gamma * lam * carry, 0.0)
        advantages[:, column] = carry
        value_after = values[:, column]
    return Advantages(advantages, advantages + values)


def group_advantages(scores: Tensor, group_size: int, *, divide_by_deviation: bool = True) -> Tensor:
    """How much better each answer is than the others to its prompt. scores: (groups * group_size,) float32, group after
    group. Returns the same shape; a group of equal scores gets 0.

    Source: arXiv:2402.03300, section 4.1.2. Without the division: arXiv:2503.20783 (easy and hard prompts weigh alike).
    """
    if group_size < 2 or scores.numel() % group_size:
        raise ValueError(f"{scores.numel()} scores do not form groups of {group_size}; a group has 2 or more")
    groups = scores.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if divide_by_deviation:
        deviation = groups.std(1, keepdim=True, correction=0)
        # Scores that differ by rounding alone must not be blown up to unit size.
        centred = torch.where(deviation > 1e-6, centred / (deviation + 1e-6), 0.0)
    return centred.reshape(-1)


def policy_losses(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, is_response: Tensor, clip: float
) -> Tensor:
    """Clipped surrogate loss at each token, (rows, length) float32, 0 off the response; to be summed over tokens.

    All (rows, length) float32 but is_response, bool. Source: arXiv:1707.06347, equation 7, with the sign of a loss.
    """
    _require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, is_response=is_response)
    ratio = _ratio(logprobs, old_logprobs, is_response)
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
    return torch.where(is_response, -torch.minimum(ratio * advantages, clipped * advantages), 0.0)


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, is_response: Tensor, clip: float) -> Tensor:
    """Half the squared error at each token, or of the clipped value if that is larger. (rows, length) float32, 0 off.

    Source: the clipping of OpenAI's PPO implementations (baselines, summarize-from-feedback), not of the paper. It
    bounds how far one iteration moves a value from `old_values`, those that the advantages were made with.
    """
    _require_same_shape(values=values, old_values=old_values, returns=returns, is_response=is_response)
    # Replaced before squaring: a NaN under the mask would come back through the gradient of `where`.
    error = torch.where(is_response, values - returns, 0.0)
    near = old_values + (values - old_values).clamp(-clip, clip)
    clipped_error = torch.where(is_response, near - returns, 0.0)
    return 0.5 * torch.maximum(error.square(), clipped_error.square())


def clip_fraction(logprobs: Tensor, old_logprobs: Tensor, is_response: Tensor, clip: float) -> Tensor:
    """Share of sampled tokens whose ratio left [1 - clip, 1 + clip], a scalar."""
    ratio = _ratio(logprobs.detach(), old_logprobs, is_response)
    return masked_mean(((ratio - 1.0).abs() > clip).float(), is_response)


def explained_variance(values: Tensor, returns: Tensor, is_response: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over sampled tokens, a scalar: 1 is perfect, 0 is no better than a
    constant; 0 too where the returns do not vary."""
    count, total, squares = masked_moments(returns, is_response)
    _, error_total, error_squares = masked_moments(returns - values, is_response)
    variance = squares / count - (total / count).square()
    if variance <= _WHITEN_EPS:
        return torch.zeros((), dtype=torch.float32)
    error_variance = error_squares / count - (error_total / count).square()
    return (1.0 - error_variance / variance).float()


def _ratio(logprobs: Tensor, old_logprobs: Tensor, is_response: Tensor) -> Tensor:
    """exp(new - old), 1 off the response."""
    log_ratio = torch.where(is_response, logprobs - old_logprobs, 0.0)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _require_same_shape(**tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes differ: {shapes}")
