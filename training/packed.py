"""The objective of pretraining and SFT: cross-entropy of the marked ids, on rows that are packed or padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from training.batches import Batch, Sample, pack, pad_rows
from training.distributed import ALONE, Spread
from training.loop import parts, rows_of_step
from training.trunk import Compute, final_hidden, target_logprobs

Row = Sequence[Sample]


@dataclass(frozen=True, slots=True)
class PackedData:
    """rows: what stands in each row, in order. Which rows a step takes is a function of the step and the seed."""

    rows: Sequence[Row]
    batch_size: int
    micro_batch_size: int
    seed: int

    def micro_batches(self, step: int) -> list[Batch]:
        chosen = rows_of_step(step, num_rows=len(self.rows), batch_size=self.batch_size, seed=self.seed)
        return [pack([self.rows[index] for index in part]) for part in parts(chosen, self.micro_batch_size)]


class StepBatches(Protocol):
    def micro_batches(self, step: int) -> Sequence[Batch]:
        """All batches of a step: a function of the step alone."""
        ...


class PackedObjective:
    """Sum of the cross-entropies of a batch's targets, and PaLM's z-loss where its coefficient is above 0."""

    def __init__(self, model: nn.Module, compute: Compute, data: StepBatches, z_loss: float = 0.0) -> None:
        self._model, self._compute, self._data, self._z_loss = model, compute, data, z_loss

    def micro_batches(self, step: int) -> Sequence[Batch]:
        return self._data.micro_batches(step)

    def weight(self, batch: Batch) -> float:
        return float(batch.num_targets)

    def num_tokens(self, batch: Batch) -> int:
        return int((batch.sample_ids > 0).sum())

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        logprobs, log_z = batch_logprobs(self._model, self._compute, batch)
        cross_entropy = -logprobs.sum()
        if self._z_loss == 0:
            return cross_entropy, {}
        # It keeps log Z near 0, so that bfloat16 logits stay small (arXiv:2204.02311, section 5).
        loss = cross_entropy + self._z_loss * log_z.square().sum()
        return loss, {"cross_entropy": float(cross_entropy.detach())}


def batch_logprobs(model: nn.Module, compute: Compute, batch: Batch) -> tuple[Tensor, Tensor]:
    """(log-probabilities, log Z) of the batch's targets in row order, each (num_targets,) float32."""
    batch = batch.to(compute.device)
    with compute.autocast():
        hidden = final_hidden(model, batch)
        # Only rows that predict something go through the head.
        return target_logprobs(model, hidden[batch.predictors()], batch.targets())


@torch.no_grad()
def sample_losses(
    model: nn.Module, compute: Compute, samples: Sequence[Sample], micro_batch_size: int, spread: Spread = ALONE
) -> list[float]:
    """Mean cross-entropy of each sample's targets, in nats per token. All ranks compute all of them."""
    model.eval()
    losses: list[float] = []
    for part in parts(samples, micro_batch_size):
        batch = pad_rows(part)
        logprobs, _ = spread.call(lambda batch=batch: batch_logprobs(model, compute, batch))
        of_samples = logprobs.cpu().split([sample.num_targets for sample in part])
        losses += [-float(own.mean()) for own in of_samples]
    model.train()
    return losses


def token_mean(losses: Sequence[float], samples: Sequence[Sample]) -> float:
    """Of all targets together, from each sample's own mean."""
    weights = [sample.num_targets for sample in samples]
    return sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
