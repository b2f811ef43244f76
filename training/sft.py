"""`causerie train sft`: a policy from a base model and conversations.

The loss is on what the assistant writes, end of turn included, by the renderer that serves too. Conversations are
packed several to a row without attention from one to another.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from quant.model_directory import DataFile, JsonValue, Manifest, Parent, hash_directory
from serving.model.chat_format import ChatFormat, ChatFormatError, ChatMessage
from training.batches import Sample, plan_packing
from training.data.load import LoadPolicy, load_conversations
from training.data.records import Conversation
from training.distributed import Ranks, join_ranks, spread_model
from training.errors import DataError, TrainingError
from training.improvement import loss_improvement
from training.loop import count_steps, make_learner, run_directory, train_steps
from training.options import record_of
from training.packed import PackedData, PackedObjective, Row, sample_losses, token_mean
from training.publish import finish_run
from training.settings import SftSettings
from training.trunk import Compute, Trunk, choose_compute, load_trunk, manifest_config

_HELD_OUT_SHARE = 0.02
_MAX_HELD_OUT = 200


@dataclass(frozen=True, slots=True)
class SftData:
    train: Sequence[Sample]
    held_out: Sequence[Sample]
    files: tuple[DataFile, ...]
    num_left_out: int  # conversations of which not even the first answer fits


def run(settings: SftSettings) -> None:
    """Read, render, train, publish. Raises TrainingError, DataError, CheckpointError."""
    compute = choose_compute(settings.device, settings.precision)
    with join_ranks(compute.device) as ranks:
        _run(settings, compute, ranks)


def _run(settings: SftSettings, compute: Compute, ranks: Ranks) -> None:
    run_dir = run_directory(settings)
    torch.manual_seed(settings.seed)
    trunk = with_chat_format(
        load_trunk(settings.model, compute, settings, checkpointing=settings.gradient_checkpointing), settings
    )
    data = read_data(settings, trunk)
    spread = spread_model(
        trunk.model,
        ranks,
        settings.sharding,
        device=compute.device,
        precision=compute.precision,
        cpu_offload=settings.cpu_offload,
    )
    before = sample_losses(trunk.model, compute, data.held_out, settings.micro_batch_size, spread)
    rows = make_rows(data.train, settings)
    packed = PackedData(rows, settings.batch_size, settings.micro_batch_size, settings.seed)
    learner = make_learner(trunk.model, settings, spread)
    num_steps = count_steps(len(rows), settings.batch_size, settings.epochs, settings.max_steps)
    objective = PackedObjective(trunk.model, compute, packed)
    if not train_steps(learner, objective, settings, run_dir, stage="sft", num_steps=num_steps):
        return
    after = sample_losses(trunk.model, compute, data.held_out, settings.micro_batch_size, learner.spread)
    manifest = _manifest(settings, trunk, data, _metrics(data, before, after))
    finish_run(trunk, settings.out, run_dir, manifest, settings, ranks=ranks)


def with_chat_format(trunk: Trunk, settings: SftSettings) -> Trunk:
    """The trunk with the chat format to train: its own, or the given template's."""
    if settings.chat_template is not None:
        template = settings.chat_template.read_text(encoding="utf-8")
        return replace(trunk, chat_format=ChatFormat(template, trunk.tokenizer), chat_template=template)
    if trunk.chat_format is None:
        raise TrainingError(f"{settings.model} has no chat format; say how to write a chat: --chat-template FILE.jinja")
    return trunk


def read_data(settings: SftSettings, trunk: Trunk) -> SftData:
    """Rendered conversations; held out are the evaluation files' rows, or a fiftieth of the data."""
    assert trunk.chat_format is not None
    loaded = load_conversations(settings.data, LoadPolicy.from_settings(settings))
    train = _render_all(loaded.rows, trunk.chat_format, settings.length)
    num_left_out = len(loaded.rows) - len(train)
    if settings.eval_data:
        policy = replace(LoadPolicy.from_settings(settings), exclude=())
        evaluation = load_conversations(settings.eval_data, policy)
        held_out = _render_all(evaluation.rows[:_MAX_HELD_OUT], trunk.chat_format, settings.length)
    else:
        count = min(_MAX_HELD_OUT, max(1, int(len(train) * _HELD_OUT_SHARE)))
        # Evenly spaced: files are often sorted by source.
        places = {round(index * len(train) / count) for index in range(count)}
        held_out = [sample for place, sample in enumerate(train) if place in places]
        train = [sample for place, sample in enumerate(train) if place not in places]
    if not train or not held_out:
        raise DataError(
            f"{len(train)} conversations to learn from and {len(held_out)} held out; both need at least one"
        )
    print(f"{loaded.report}; {len(train):,} to learn from, {num_left_out} too long", file=sys.stderr)
    return SftData(train, held_out, loaded.files, num_left_out)


def render_sample(messages: Sequence[ChatMessage], chat_format: ChatFormat, length: int) -> Sample | None:
    """A conversation in at most `length` tokens, its last turns left out; None if the first answer does not fit."""
    turns = list(messages)
    while any(message.role == "assistant" for message in turns):
        ids, is_answer = chat_format.render_with_loss_mask(turns)
        if len(ids) <= length:
            return Sample(tuple(ids), tuple(is_answer))
        last = max(index for index, message in enumerate(turns) if message.role == "assistant")
        # A conversation to learn from ends with an answer.
        turns = turns[: max((index + 1 for index in range(last) if turns[index].role == "assistant"), default=0)]
    return None


def make_rows(samples: Sequence[Sample], settings: SftSettings) -> list[Row]:
    if not settings.packing:
        return [[sample] for sample in samples]
    plan = plan_packing([len(sample.ids) for sample in samples], settings.length)
    return [[samples[index] for index in row] for row in plan]


def _render_all(rows: Sequence[Conversation], chat_format: ChatFormat, length: int) -> list[Sample]:
    samples: list[Sample] = []
    for row in rows:
        try:
            sample = render_sample(row.messages, chat_format, length)
        except ChatFormatError as error:
            raise DataError(f"a conversation of source {row.source!r} cannot be rendered: {error}") from error
        if sample is not None:
            samples.append(sample)
    return samples


def _metrics(data: SftData, before: Sequence[float], after: Sequence[float]) -> dict[str, JsonValue]:
    return {
        "held_out_loss_before": token_mean(before, data.held_out),
        "held_out_loss": token_mean(after, data.held_out),
        **loss_improvement(before, after),
        "conversations": len(data.train),
        "conversations_too_long": data.num_left_out,
    }


def _manifest(settings: SftSettings, trunk: Trunk, data: SftData, metrics: Mapping[str, JsonValue]) -> Manifest:
    assert trunk.chat_format is not None
    return Manifest(
        stage="sft",
        parents=(Parent(settings.model.name, hash_directory(settings.model)),),
        data=data.files,
        config=manifest_config(record_of(settings)),
        seed=settings.seed,
        metrics=metrics,
        chat_format_sha256=trunk.chat_format.sha256,
    )
