"""What `test_distributed` runs on two ranks: sharded steps, compared with the same steps in one process.

The first rank prints one JSON object with what the test asserts. Run by torchrun, never by pytest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from serving.cli import end_process
from tests.training.tiny_llama import random_samples, tiny_llama
from training.batches import Batch, Sample, pad_rows
from training.checkpoint import restore_checkpoint, save_checkpoint
from training.distributed import ALONE, Spread, full_tensor, full_tensors, join_ranks, spread_model
from training.loop import accumulate, optimizer_step
from training.trunk import final_hidden, recompute_activations, target_logprobs

CPU = torch.device("cpu")


class TokenLoss:
    """Cross-entropy of the targets, as in supervised fine-tuning."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def micro_batches(self, step: int) -> Sequence[Batch]:
        """Three of unequal weight: with two ranks, one of them has one batch fewer."""
        samples: list[Sample] = random_samples(7, seed=step)
        return [pad_rows(samples[:2]), pad_rows(samples[2:3]), pad_rows(samples[3:])]

    def weight(self, batch: Batch) -> float:
        return float(batch.num_targets)

    def num_tokens(self, batch: Batch) -> int:
        return int((batch.sample_ids > 0).sum())

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        hidden = final_hidden(self._model, batch)
        logprobs, _ = target_logprobs(self._model, hidden[batch.predictors()], batch.targets())
        return -logprobs.sum(), {"tokens": float(logprobs.shape[0])}


def main(directory: Path, *, cpu_offload: bool, precision: torch.dtype, checkpointing: bool) -> None:
    with join_ranks(CPU) as ranks:
        reference, model = _model(checkpointing), _model(checkpointing)
        spread_again = partial(
            spread_model, ranks=ranks, sharding="fsdp", device=CPU, precision=precision, cpu_offload=cpu_offload
        )
        spread = spread_again(model)
        alone = accumulate(TokenLoss(reference), TokenLoss(reference).micro_batches(0), ALONE)
        shared = accumulate(TokenLoss(model), TokenLoss(model).micro_batches(0), spread)
        found = {
            "ranks": ranks.world_size,
            "all_dtensors": all(isinstance(parameter, DTensor) for parameter in model.parameters()),
            "local_elements": sum(_local(parameter).numel() for parameter in model.parameters()),
            "elements": sum(parameter.numel() for parameter in reference.parameters()),
            "gradient_error": _largest_gap(_gradients(reference), _gradients(model)),
            "gradient_scale": max(float(gradient.abs().max()) for gradient in _gradients(reference)),
            "loss_gap": abs(alone.values["loss"] - shared.values["loss"]),
            "token_gap": abs(alone.values["tokens"] - shared.values["tokens"]),
            **_resume(model, spread, directory, spread_again),
        }
        state = full_tensors(model)
        found["tied"] = bool(state) and state["lm_head.weight"] is state["model.embed_tokens.weight"]
        if ranks.is_first:
            print(json.dumps(found))


def _model(checkpointing: bool) -> nn.Module:
    model = tiny_llama().train()
    if checkpointing:
        recompute_activations(model)
    return model


def _resume(
    model: nn.Module, spread: Spread, directory: Path, spread_again: Callable[[nn.Module], Spread]
) -> dict[str, bool]:
    """Two steps and a checkpoint between them; a second model goes on from it."""
    optimizer = AdamW(model.parameters(), lr=1e-2, fused=True)
    model.zero_grad()
    _step(model, optimizer, spread, 0)
    save_checkpoint(
        directory,
        modules={"model": model},
        optimizers={"optimizer": optimizer},
        record={"step": 1},
        ranks=spread.ranks,
    )
    _step(model, optimizer, spread, 1)

    other = tiny_llama(seed=7).train()
    again = spread_again(other)
    other_optimizer = AdamW(other.parameters(), lr=1e-2, fused=True)
    restore_checkpoint(directory, {"model": other}, {"optimizer": other_optimizer}, spread.ranks)
    _step(other, other_optimizer, again, 1)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return {"resumed_equal": all(torch.equal(_local(one), _local(two)) for one, two in pairs)}


def _step(model: nn.Module, optimizer: AdamW, spread: Spread, step: int) -> None:
    objective = TokenLoss(model)
    accumulate(objective, objective.micro_batches(step), spread)
    optimizer_step(optimizer, 1e-2, max_grad_norm=0.5)


def _gradients(model: nn.Module) -> list[Tensor]:
    return [full_tensor(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]


def _largest_gap(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(ones, others, strict=True))


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        cpu_offload="offload" in sys.argv,
        precision=torch.bfloat16 if "bfloat16" in sys.argv else torch.float32,
        checkpointing="checkpointing" in sys.argv,
    )
    end_process(0)
