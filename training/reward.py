"""`causerie train reward`: a reward model from ranked answers, and a report on rankings that it has not seen.

All answers of a ranking are one element of a batch (arXiv:2203.02155, section 3.5), never split: as separate rows the
same answer would be learned from K - 1 times in different steps, and over-fitted.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quant.model_directory import DataFile, Manifest, Parent, hash_directory
from serving.model.chat_format import ChatFormat, ChatMessage
from serving.model.tokenizer import ModelTokenizer
from training.batches import Batch, Sample, pad_rows
from training.data.load import CleaningReport, LoadPolicy, load_rankings
from training.data.records import Ranking
from training.distributed import Spread, full_tensor, join_ranks, spread_model
from training.errors import DataError, TrainingError
from training.improvement import loss_improvement
from training.loop import count_steps, make_learner, parts, rows_of_step, run_directory, train_steps
from training.options import record_of
from training.publish import finish_run
from training.reward_loss import Pairs, pairs_of, pairwise_logistic_loss
from training.reward_metrics import Comparison, accuracy
from training.reward_model import (
    RewardModel,
    RewardRecord,
    conversation_ids,
    hidden_size_of,
    new_head,
    save_reward_head,
    shortened,
)
from training.reward_report import RewardReport, build_report, manifest_metrics, write_report
from training.settings import RewardSettings
from training.trunk import Trunk, choose_compute, load_trunk, manifest_config

# Answers by which scores are normalised: their mean is then known to 2 % of a deviation.
_NORMALISED_ON = 2000


@dataclass(frozen=True, slots=True)
class EncodedRanking:
    """ids: of each answer's whole conversation, end of turn included. ranks: 1 is best; answer_lengths: in tokens."""

    ids: tuple[tuple[int, ...], ...]
    ranks: tuple[int, ...]
    answer_lengths: tuple[int, ...]
    source: str


@dataclass(frozen=True, slots=True)
class RankingData:
    """train and held_out share no prompt. too_long: rankings left out because an answer alone is over the length."""

    train: tuple[EncodedRanking, ...]
    held_out: tuple[EncodedRanking, ...]
    too_long: int
    files: tuple[DataFile, ...]
    cleaning: CleaningReport

    @property
    def summary(self) -> str:
        return f"rankings: {self.cleaning}; {len(self.held_out):,} held out, {self.too_long:,} too long"


@dataclass(frozen=True, slots=True)
class RewardBatch:
    """Whole rankings. batch: (answers, length), one answer to a row; pairs: indices of its rows."""

    batch: Batch
    pairs: Pairs


class RewardObjective:
    """The pairwise loss over whole rankings; a metric `accuracy` beside it."""

    def __init__(self, model: RewardModel, rankings: Sequence[EncodedRanking], settings: RewardSettings) -> None:
        self._model, self._rankings, self._settings = model, rankings, settings

    def micro_batches(self, step: int) -> Sequence[RewardBatch]:
        settings = self._settings
        rows = rows_of_step(step, num_rows=len(self._rankings), batch_size=settings.batch_size, seed=settings.seed)
        return [batch_of([self._rankings[row] for row in part]) for part in parts(rows, settings.micro_batch_size)]

    def weight(self, batch: RewardBatch) -> float:
        return float(batch.pairs.weight.sum())

    def num_tokens(self, batch: RewardBatch) -> int:
        return int((batch.batch.sample_ids > 0).sum())

    def loss(self, batch: RewardBatch) -> tuple[Tensor, Mapping[str, float]]:
        device = self._model.compute.device
        pairs = batch.pairs.to(device)
        scores = self._model(batch.batch.to(device))
        wins = (scores[pairs.better] > scores[pairs.worse]).float()
        return pairwise_logistic_loss(scores, pairs), {"accuracy": float((wins * pairs.weight).sum())}


def run(settings: RewardSettings) -> None:
    """Read, train, normalise, report, publish. Raises TrainingError, DataError."""
    run_dir = run_directory(settings)
    torch.manual_seed(settings.seed)
    compute = choose_compute(settings.device, settings.precision)
    with join_ranks(compute.device) as ranks:
        trunk = load_trunk(settings.model, compute, settings, checkpointing=settings.gradient_checkpointing)
        data = read_rankings(settings, trunk)
        if ranks.is_first:
            print(data.summary, file=sys.stderr)
        model = new_reward_model(trunk, settings)
        spread = spread_model(
            model,
            ranks,
            settings.sharding,
            device=compute.device,
            precision=compute.precision,
            cpu_offload=settings.cpu_offload,
            in_float32=[model.head],
        )
        before = raw_scores(model, data.held_out, spread)
        objective = RewardObjective(model, data.train, settings)
        learner = make_learner(model, settings, spread)
        num_steps = count_steps(len(data.train), settings.batch_size, settings.epochs, settings.max_steps)
        if train_steps(learner, objective, settings, run_dir, stage="reward", num_steps=num_steps):
            finish(settings, trunk, model, data, before, learner.spread, run_dir)


def read_rankings(settings: RewardSettings, trunk: Trunk) -> RankingData:
    """Held out are the rankings of --eval-data, or else a share of the prompts. Raises DataError."""
    loaded = load_rankings(settings.data, LoadPolicy.from_settings(settings))
    if settings.eval_data:
        train, held_out = loaded.rows, load_rankings(settings.eval_data, LoadPolicy()).rows
    else:
        train, held_out = split_by_prompt(loaded.rows, settings.held_out)
    encoded = [encode_rankings(rows, trunk, settings.length) for rows in (train, held_out)]
    for name, rows in zip(("train on", "report on"), encoded, strict=True):
        if not rows:
            raise DataError(f"no ranking is left to {name} within {settings.length} tokens; raise --length")
    too_long = len(train) + len(held_out) - sum(map(len, encoded))
    return RankingData(encoded[0], encoded[1], too_long, loaded.files, loaded.report)


def split_by_prompt(rankings: Sequence[Ranking], share: float) -> tuple[tuple[Ranking, ...], tuple[Ranking, ...]]:
    """(train, held out) by a hash of the prompt, so that a prompt's rankings are on one side. Neither is empty."""
    places = {ranking.prompt: _place(ranking.prompt) for ranking in rankings}
    if len(places) < 2:
        raise DataError("all rankings have the same prompt; give others as --eval-data")
    # At least one prompt of the fewest, however small the share is.
    border = sorted(places.values())[max(1, round(share * len(places))) - 1]
    held_out = tuple(ranking for ranking in rankings if places[ranking.prompt] <= border)
    return tuple(ranking for ranking in rankings if places[ranking.prompt] > border), held_out


def _place(prompt: Sequence[ChatMessage]) -> bytes:
    text = "\0".join(part for message in prompt for part in (message.role, message.content))
    return hashlib.sha256(text.encode()).digest()


def encode_rankings(rankings: Sequence[Ranking], trunk: Trunk, length: int) -> tuple[EncodedRanking, ...]:
    """Without those whose answers do not fit even with the last user's turn alone."""
    chat_format = chat_format_of(trunk)
    found = (encode_ranking(ranking, chat_format, trunk.tokenizer, length) for ranking in rankings)
    return tuple(ranking for ranking in found if ranking is not None)


def encode_ranking(
    ranking: Ranking, chat_format: ChatFormat, tokenizer: ModelTokenizer, length: int
) -> EncodedRanking | None:
    """All answers after the same turns: as many of the prompt as the longest answer leaves room for."""
    for prompt in shortened((*ranking.prompt, ChatMessage("assistant", ""))):
        turns = prompt[:-1]
        ids = tuple(
            conversation_ids(chat_format, tokenizer, (*turns, ChatMessage("assistant", answer)))
            for answer in ranking.answers
        )
        if max(map(len, ids)) <= length:
            num_prompt = len(chat_format.render(turns))
            return EncodedRanking(ids, ranking.ranks, tuple(len(row) - num_prompt for row in ids), ranking.source)
    return None


def chat_format_of(trunk: Trunk) -> ChatFormat:
    if trunk.chat_format is None:
        raise TrainingError(f"{trunk.source} has no chat format; train reward starts from an SFT model")
    return trunk.chat_format


def new_reward_model(trunk: Trunk, settings: RewardSettings) -> RewardModel:
    """The trunk with a new head that knows no normalisation yet."""
    generator = torch.Generator().manual_seed(settings.seed)
    head = new_head(hidden_size_of(trunk.model), generator).to(trunk.compute.device)
    record = RewardRecord(0.0, 1.0, hash_directory(settings.model), settings.length)
    return RewardModel(trunk.model, head, trunk.tokenizer, chat_format_of(trunk), trunk.compute, record)


def batch_of(rankings: Sequence[EncodedRanking]) -> RewardBatch:
    """All answers of all rankings, ranking by ranking."""
    rows = [Sample(ids, (False,) * len(ids)) for ranking in rankings for ids in ranking.ids]
    return RewardBatch(pad_rows(rows), pairs_of([ranking.ranks for ranking in rankings]))


def raw_scores(model: RewardModel, rankings: Sequence[EncodedRanking], spread: Spread) -> list[float]:
    """Of every answer, ranking by ranking, without dropout."""
    was_training = model.training
    model.eval()
    try:
        return spread.call(lambda: model.score_ids([ids for ranking in rankings for ids in ranking.ids])).tolist()
    finally:
        model.train(was_training)


def compare(rankings: Sequence[EncodedRanking], scores: Sequence[float]) -> list[Comparison]:
    """Every pair of every ranking. scores: of every answer, ranking by ranking."""
    pairs = pairs_of([ranking.ranks for ranking in rankings])
    lengths = [length for ranking in rankings for length in ranking.answer_lengths]
    sources = [ranking.source for ranking in rankings for _ in ranking.ids]
    return [
        Comparison(sources[better], scores[better], scores[worse], lengths[better], lengths[worse])
        for better, worse in zip(pairs.better.tolist(), pairs.worse.tolist(), strict=True)
    ]


def evenly(rankings: Sequence[EncodedRanking], max_answers: int) -> Iterator[EncodedRanking]:
    """Rankings from all over the data, with about `max_answers` answers together."""
    num_answers = sum(len(ranking.ids) for ranking in rankings)
    stride = max(1, round(num_answers / max_answers))
    return iter(rankings[::stride])


def finish(
    settings: RewardSettings,
    trunk: Trunk,
    model: RewardModel,
    data: RankingData,
    before: Sequence[float],
    spread: Spread,
    run_dir: Path,
) -> None:
    """Normalise on training answers, report on held-out ones, publish. before: the untrained head's raw scores."""
    record = normalisation(model, data, spread)
    after = raw_scores(model, data.held_out, spread)
    report = report_on(data, before, after, record)
    weight = full_tensor(model.head.weight).detach()
    files: tuple[Path, ...] = ()
    if spread.ranks.is_first:
        files = (*save_reward_head(run_dir, weight, record), *write_report(report, run_dir))
    manifest = Manifest(
        stage="reward",
        parents=(Parent(settings.model.absolute().name, record.trunk_sha256),),
        data=data.files,
        config=manifest_config(record_of(settings)),
        seed=settings.seed,
        metrics={
            **manifest_metrics(report),
            **loss_improvement(ranking_losses(data.held_out, before), ranking_losses(data.held_out, after)),
            "cleaning": data.cleaning.record(),
            "rankings_too_long": data.too_long,
        },
        chat_format_sha256=model.chat_format.sha256,
    )
    finish_run(trunk, settings.out, run_dir, manifest, settings, files=files, ranks=spread.ranks)


def normalisation(model: RewardModel, data: RankingData, spread: Spread) -> RewardRecord:
    """The record with mean and deviation of raw scores on training answers."""
    scores = torch.tensor(raw_scores(model, tuple(evenly(data.train, _NORMALISED_ON)), spread))
    deviation = float(scores.std(correction=0))
    if not deviation > 0:
        raise TrainingError("the reward model scores all training answers alike; train longer or with a higher rate")
    return replace(model.record, mean=float(scores.mean()), deviation=deviation)


def report_on(data: RankingData, before: Sequence[float], after: Sequence[float], record: RewardRecord) -> RewardReport:
    return build_report(
        compare(data.held_out, after),
        after,
        [length for ranking in data.held_out for length in ranking.answer_lengths],
        rankings=len(data.held_out),
        before=accuracy(compare(data.held_out, before)),
        mean=record.mean,
        deviation=record.deviation,
    )


def ranking_losses(rankings: Sequence[EncodedRanking], scores: Sequence[float]) -> list[float]:
    """The loss of each ranking. scores: of every answer, ranking by ranking."""
    losses: list[float] = []
    start = 0
    for ranking in rankings:
        end = start + len(ranking.ids)
        losses.append(float(pairwise_logistic_loss(torch.tensor(scores[start:end]), pairs_of([ranking.ranks]))))
        start = end
    return losses
