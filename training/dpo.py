"""`causerie train dpo`: a policy from ranked answers, without a reward model and without sampling.

All answers of a ranking are one element of a batch, as for the reward model. The reference is the policy as it was
before the first step: its log-probabilities are taken then, and no second model is kept.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quant.model_directory import DataFile, JsonValue, Manifest, Parent, hash_directory
from training.batches import Sample, pad_rows
from training.data.load import LoadPolicy, load_rankings
from training.data.records import Ranking
from training.distributed import ALONE, Spread, join_ranks, spread_model
from training.dpo_loss import dpo_losses, implicit_rewards
from training.errors import DataError
from training.improvement import loss_improvement
from training.loop import count_steps, make_learner, parts, rows_of_step, run_directory, train_steps
from training.options import record_of
from training.packed import batch_logprobs
from training.prompts import require_chat_format
from training.publish import finish_run
from training.reward import EncodedRanking, encode_rankings, split_by_prompt
from training.reward_loss import Pairs, pairs_of
from training.roles import prepare_mode
from training.settings import DpoSettings
from training.trunk import Compute, Trunk, choose_compute, load_trunk, manifest_config

_MAX_HELD_OUT = 200


@dataclass(frozen=True, slots=True)
class DpoRanking:
    """answers: whole conversations whose targets are the answer. reference: each answer's log-probability before."""

    answers: tuple[Sample, ...]
    ranks: tuple[int, ...]
    reference: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class DpoData:
    train: tuple[DpoRanking, ...]
    held_out: tuple[DpoRanking, ...]
    files: tuple[DataFile, ...]


def run(settings: DpoSettings) -> None:
    """Read, take the reference, train, publish. Raises TrainingError, DataError, CheckpointError."""
    compute = choose_compute(settings.device, settings.precision)
    run_dir = run_directory(settings)
    torch.manual_seed(settings.seed)
    with join_ranks(compute.device) as ranks:
        trunk = load_trunk(settings.model, compute, settings, checkpointing=settings.gradient_checkpointing)
        prepare_mode(trunk.model, settings, checkpointing=settings.gradient_checkpointing)
        data = read_data(settings, trunk)
        spread = spread_model(
            trunk.model,
            ranks,
            settings.sharding,
            device=compute.device,
            precision=compute.precision,
            cpu_offload=settings.cpu_offload,
        )
        size = settings.micro_batch_size
        train = with_reference(data.train, trunk.model, compute, size, spread)
        held_out = with_reference(data.held_out, trunk.model, compute, size, spread)
        objective = DpoObjective(trunk.model, compute, train, settings)
        learner = make_learner(trunk.model, settings, spread)
        num_steps = count_steps(len(train), settings.batch_size, settings.epochs, settings.max_steps)
        if train_steps(learner, objective, settings, run_dir, stage="dpo", num_steps=num_steps):
            metrics = measure(held_out, trunk.model, compute, settings, learner.spread)
            finish_run(trunk, settings.out, run_dir, _manifest(settings, trunk, data, metrics), settings, ranks=ranks)


class DpoObjective:
    """Sum of the losses of all pairs, a pair of a K-way ranking weighing 1 / C(K, 2)."""

    def __init__(
        self, model: nn.Module, compute: Compute, rankings: Sequence[DpoRanking], settings: DpoSettings
    ) -> None:
        self._model, self._compute, self._rankings, self._settings = model, compute, rankings, settings

    def micro_batches(self, step: int) -> Sequence[Sequence[DpoRanking]]:
        settings = self._settings
        rows = rows_of_step(step, num_rows=len(self._rankings), batch_size=settings.batch_size, seed=settings.seed)
        return [[self._rankings[row] for row in part] for part in parts(rows, settings.micro_batch_size)]

    def weight(self, batch: Sequence[DpoRanking]) -> float:
        return float(_pairs(batch).weight.sum())

    def num_tokens(self, batch: Sequence[DpoRanking]) -> int:
        return sum(len(answer.ids) for ranking in batch for answer in ranking.answers)

    def loss(self, batch: Sequence[DpoRanking]) -> tuple[Tensor, Mapping[str, float]]:
        pairs = _pairs(batch)
        logprobs = answer_logprobs(self._model, self._compute, batch)
        reference = torch.tensor([value for ranking in batch for value in ranking.reference])
        rewards = implicit_rewards(logprobs, reference, self._settings.beta)
        better, worse = rewards[pairs.better], rewards[pairs.worse]
        margins = (better - worse).detach()
        values = {
            "accuracy": float(((margins > 0) * pairs.weight).sum()),
            "margin": float((margins * pairs.weight).sum()),
        }
        return (dpo_losses(better, worse) * pairs.weight).sum(), values


def answer_logprobs(model: nn.Module, compute: Compute, batch: Sequence[DpoRanking]) -> Tensor:
    """(answers,) float32 in main memory: of each answer, summed over its tokens."""
    samples = [answer for ranking in batch for answer in ranking.answers]
    logprobs, _ = batch_logprobs(model, compute, pad_rows(samples))
    return torch.stack([own.sum() for own in logprobs.cpu().split([sample.num_targets for sample in samples])])


@torch.no_grad()
def with_reference(
    rankings: Sequence[DpoRanking], model: nn.Module, compute: Compute, size: int, spread: Spread = ALONE
) -> tuple[DpoRanking, ...]:
    """The rankings with the present model's log-probabilities as the reference."""
    found: list[DpoRanking] = []
    for batch in parts(rankings, size):
        logprobs = iter(spread.call(lambda batch=batch: answer_logprobs(model, compute, batch)).tolist())
        found += [replace(ranking, reference=tuple(next(logprobs) for _ in ranking.answers)) for ranking in batch]
    return tuple(found)


@torch.no_grad()
def measure(
    rankings: Sequence[DpoRanking], model: nn.Module, compute: Compute, settings: DpoSettings, spread: Spread = ALONE
) -> dict[str, JsonValue]:
    """For the manifest: loss and accuracy on rankings that were not trained on. Before training each loss is log 2."""
    objective = DpoObjective(model, compute, rankings, settings)
    losses: list[float] = []
    right = 0.0
    for ranking in rankings:
        loss, values = spread.call(lambda ranking=ranking: objective.loss([ranking]))
        losses.append(float(loss) / objective.weight([ranking]))
        right += values["accuracy"] / objective.weight([ranking])
    return {
        "held_out_loss": sum(losses) / len(losses),
        "held_out_accuracy": right / len(losses),
        **loss_improvement([math.log(2.0)] * len(losses), losses),
    }


def read_data(settings: DpoSettings, trunk: Trunk) -> DpoData:
    """Held out are the rankings of --eval-data, or else a share of the prompts. Raises DataError."""
    require_chat_format(trunk)
    loaded = load_rankings(settings.data, LoadPolicy.from_settings(settings))
    if settings.eval_data:
        train, held_out = loaded.rows, load_rankings(settings.eval_data, LoadPolicy()).rows
    else:
        train, held_out = split_by_prompt(loaded.rows, settings.held_out)
    encoded = [_encode(rows, trunk, settings.length) for rows in (train, held_out[:_MAX_HELD_OUT])]
    if not all(encoded):
        raise DataError(f"no ranking is left within {settings.length} tokens; raise --length")
    print(f"rankings: {loaded.report}; {len(encoded[1]):,} held out", file=sys.stderr)
    return DpoData(encoded[0], encoded[1], loaded.files)


def _encode(rankings: Sequence[Ranking], trunk: Trunk, length: int) -> tuple[DpoRanking, ...]:
    return tuple(_dpo_ranking(ranking) for ranking in encode_rankings(rankings, trunk, length))


def _dpo_ranking(ranking: EncodedRanking) -> DpoRanking:
    answers = tuple(
        Sample(ids, tuple(place >= len(ids) - num_answer for place in range(len(ids))))
        for ids, num_answer in zip(ranking.ids, ranking.answer_lengths, strict=True)
    )
    return DpoRanking(answers, ranking.ranks)


def _pairs(batch: Sequence[DpoRanking]) -> Pairs:
    return pairs_of([ranking.ranks for ranking in batch])


def _manifest(settings: DpoSettings, trunk: Trunk, data: DpoData, metrics: Mapping[str, JsonValue]) -> Manifest:
    return Manifest(
        stage="dpo",
        parents=(Parent(settings.model.name, hash_directory(settings.model)),),
        data=data.files,
        config=manifest_config(record_of(settings)),
        seed=settings.seed,
        metrics=metrics,
        chat_format_sha256=require_chat_format(trunk).sha256,
    )
