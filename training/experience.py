"""From sampled answers to what an update learns from: the passes without gradients, rewards and advantages.

Which answers go through the models together is planned once an iteration. A token's old and new log-probability then
come from the same kernels on the same shapes, so that their ratio is 1 exactly before the first update, in any
precision; no answer is recomputed among other neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.batches import Batch
from training.rollout import Trajectory


@dataclass(frozen=True, slots=True)
class CriticTargets:
    """Both (rows, length) float32, 0 off the response.

    old_values: the critic's estimates that the advantages were made with; returns: what it is to predict
    """

    old_values: Tensor
    returns: Tensor


@dataclass(frozen=True, slots=True)
class Experience:
    """An iteration's answers and what is known of them. All but scores (rows, length) float32, 0 off the response.

    scores:               (rows,) float32, the reward model's, before cut and penalty
    old_logprobs:         by the training forward at the sampling temperature, before the first update
    reference_logprobs:   likewise, by the frozen reference
    advantages:           ready for the loss (whitened, or normalised within groups)
    critic:               None for objectives without a critic
    """

    trajectory: Trajectory
    scores: Tensor
    old_logprobs: Tensor
    reference_logprobs: Tensor
    advantages: Tensor
    critic: CriticTargets | None = None

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a checkpoint; `experience_from` reads them."""
        named = {f"trajectory.{name}": tensor for name, tensor in self.trajectory.tensors().items()}
        named |= {
            "scores": self.scores,
            "old_logprobs": self.old_logprobs,
            "reference_logprobs": self.reference_logprobs,
            "advantages": self.advantages,
        }
        if self.critic is not None:
            named |= {"old_values": self.critic.old_values, "returns": self.critic.returns}
        return named


def experience_from(tensors: Mapping[str, Tensor]) -> Experience:
    prefix = "trajectory."
    trajectory = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    critic = CriticTargets(tensors["old_values"], tensors["returns"]) if "returns" in tensors else None
    return Experience(
        Trajectory(**trajectory),
        tensors["scores"],
        tensors["old_logprobs"],
        tensors["reference_logprobs"],
        tensors["advantages"],
        critic,
    )


def iteration_seed(seed: int, iteration: int) -> int:
    """Of the order in which an iteration's answers are learned from."""
    return (seed * 1_000_003 + iteration) % 2**62


@dataclass(frozen=True, slots=True)
class UpdatePlan:
    """Which answers share a forward pass, and which forward passes an optimizer step.

    micro_batches: row indices of each pass, answers of similar length together so that little is padding
    per_update:    passes of an optimizer step
    """

    micro_batches: tuple[Tensor, ...]
    per_update: int
    epochs: int

    @property
    def updates_per_epoch(self) -> int:
        return -(-len(self.micro_batches) // self.per_update)

    @property
    def num_updates(self) -> int:
        return self.updates_per_epoch * self.epochs

    def of_update(self, index: int, seed: int) -> list[Tensor]:
        """The passes of one optimizer step: each epoch takes all of them once, in an order of its own."""
        epoch, place = divmod(index, self.updates_per_epoch)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(len(self.micro_batches), generator=generator).tolist()
        chosen = order[place * self.per_update : (place + 1) * self.per_update]
        return [self.micro_batches[i] for i in chosen]


def plan_updates(lengths: Tensor, *, micro_batch_size: int, batch_size: int, epochs: int) -> UpdatePlan:
    """lengths: (rows,) int64, tokens of each answer with its prompt. Deterministic."""
    by_length = torch.argsort(lengths, descending=True, stable=True)
    micro_batches = by_length.split(micro_batch_size)
    return UpdatePlan(tuple(micro_batches), max(1, batch_size // micro_batch_size), epochs)


def place_responses(is_response: Tensor, values: Tensor) -> Tensor:
    """(rows, length) float32 with `values` (sampled tokens,) at the True positions in row order, 0 elsewhere.

    Differentiable with respect to values.
    """
    placed = torch.zeros(is_response.shape, dtype=torch.float32, device=values.device)
    return placed.masked_scatter(is_response.to(values.device), values.float())


@torch.no_grad()
def at_responses(trajectory: Trajectory, micro_batches: Sequence[Tensor], compute: Callable[[Batch], Tensor]) -> Tensor:
    """What `compute` gives for each sampled token, on the CPU: (rows, length) float32, 0 off the response.

    compute: from a batch to (targets,) values in row order.
    """
    found = torch.zeros(trajectory.ids.shape, dtype=torch.float32)
    for rows in micro_batches:
        batch = trajectory.batch(rows)
        found[rows, : batch.input_ids.shape[1]] = place_responses(batch.is_target, compute(batch).cpu())
    return found


@torch.no_grad()
def at_rows(trajectory: Trajectory, micro_batches: Sequence[Tensor], compute: Callable[[Batch], Tensor]) -> Tensor:
    """What `compute` gives for each answer, on the CPU: (rows,) float32. compute: from a batch to one value a row."""
    found = torch.zeros(trajectory.num_rows, dtype=torch.float32)
    for rows in micro_batches:
        found[rows] = compute(trajectory.batch(rows)).float().cpu()
    return found
