"""The loss of direct preference optimisation: a pure function on log-probabilities of whole answers."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def implicit_rewards(logprobs: Tensor, reference_logprobs: Tensor, beta: float) -> Tensor:
    """beta * log(policy / reference) of each answer, the reward that the policy is optimal for. (answers,) float32.

    Both arguments (answers,) float32: sums over an answer's tokens, end of turn included.
    """
    return beta * (logprobs - reference_logprobs)


def dpo_losses(better: Tensor, worse: Tensor) -> Tensor:
    """Minus the log of the probability that the preferred answer wins, (pairs,). Arguments: (pairs,) implicit rewards.

    Source: arXiv:2305.18290, equation 7.
    """
    return -logsigmoid(better - worse)
