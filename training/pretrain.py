"""`causerie train pretrain`: a base model from random weights, and its tokenizer.

Documents are tokenized once, joined with <|endoftext|> before each, and cut into rows without padding. The model is
PaLM's (arXiv:2204.02311) or Llama's, by the size's name.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from quant.model_directory import DataFile, JsonValue, Manifest
from serving.model.tokenizer import ModelTokenizer
from training.batches import Batch
from training.data.load import LoadPolicy, load_conversations, load_documents
from training.distributed import Ranks, Spread, join_ranks, spread_model
from training.errors import TrainingError
from training.improvement import loss_improvement
from training.loop import (
    count_steps,
    make_learner,
    parts,
    rows_of_step,
    run_directory,
    train_steps,
)
from training.options import record_of
from training.packed import PackedObjective, batch_logprobs
from training.publish import finish_run
from training.settings import AdapterSettings, PretrainSettings
from training.sizes import ModelSize, config_of, find_size
from training.tokenizer import END_OF_TEXT, train_tokenizer, write_tokenizer
from training.trunk import Compute, Trunk, choose_compute, copy_text_files, manifest_config, recompute_activations

_TOKENIZER_FOLDER = "tokenizer"
_HELD_OUT_ROWS = 128
# Embeddings are as large as PaLM's; `logit_scale` brings the logits back to about 1.
_EMBEDDING_STD = 1.0


@dataclass(frozen=True, slots=True)
class Texts:
    """What is read: the texts themselves and where they are from."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    files: tuple[DataFile, ...]


def run(settings: PretrainSettings) -> None:
    """Read, tokenize, train, publish. Raises TrainingError, DataError."""
    compute = choose_compute(settings.device, settings.precision)
    with join_ranks(compute.device) as ranks:
        _run(settings, compute, ranks)


def _run(settings: PretrainSettings, compute: Compute, ranks: Ranks) -> None:
    run_dir = run_directory(settings)
    torch.manual_seed(settings.seed)
    texts = read_texts(settings)
    size = model_size(settings)
    tokenizer = prepare_tokenizer(settings, texts, size, run_dir)
    rows = cut_rows(tokenizer, texts.train, settings.length)
    held_out = cut_rows(tokenizer, texts.held_out, settings.length)[:_HELD_OUT_ROWS]
    model = build_model(size, tokenizer, settings.length).to(compute.device)
    if settings.gradient_checkpointing:
        recompute_activations(model)
    spread = spread_model(
        model,
        ranks,
        settings.sharding,
        device=compute.device,
        precision=compute.precision,
        cpu_offload=settings.cpu_offload,
    )
    before = row_losses(model, compute, held_out, settings.micro_batch_size, spread)
    data = TextRows(rows, settings.batch_size, settings.micro_batch_size, settings.seed)
    learner = make_learner(model, settings, spread)
    num_steps = count_steps(rows.shape[0], settings.batch_size, settings.epochs, settings.max_steps)
    objective = PackedObjective(model, compute, data, settings.z_loss)
    if not train_steps(learner, objective, settings, run_dir, stage="pretrain", num_steps=num_steps):
        return
    after = row_losses(model, compute, held_out, settings.micro_batch_size, learner.spread)
    manifest = Manifest(
        stage="pretrain",
        data=texts.files,
        config=manifest_config(record_of(settings)),
        seed=settings.seed,
        metrics=_metrics(settings, num_steps, before, after),
    )
    trunk = Trunk(model, tokenizer, None, run_dir / _TOKENIZER_FOLDER, compute)
    finish_run(trunk, settings.out, run_dir, manifest, AdapterSettings(method="full"), ranks=ranks)


def _metrics(
    settings: PretrainSettings, num_steps: int, before: Sequence[float], after: Sequence[float]
) -> dict[str, JsonValue]:
    loss = statistics.fmean(after)
    return {
        "held_out_loss_before": statistics.fmean(before),
        "held_out_loss": loss,
        "held_out_perplexity": math.exp(loss),
        **loss_improvement(before, after),
        "tokens": num_steps * settings.batch_size * settings.length,
    }


@dataclass(frozen=True, slots=True)
class TextRows:
    """rows: (rows, length) int64 on the CPU, without padding."""

    rows: Tensor
    batch_size: int
    micro_batch_size: int
    seed: int

    def micro_batches(self, step: int) -> list[Batch]:
        chosen = rows_of_step(step, num_rows=self.rows.shape[0], batch_size=self.batch_size, seed=self.seed)
        return [row_batch(self.rows[list(part)]) for part in parts(chosen, self.micro_batch_size)]


def row_batch(rows: Tensor) -> Batch:
    """Full rows as one sample each. rows: (rows, length) int64."""
    positions = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    ones = torch.ones_like(rows)
    is_target = ones.bool()
    is_target[:, 0] = False
    return Batch(rows, positions, ones, is_target)


@torch.no_grad()
def row_losses(model: nn.Module, compute: Compute, rows: Tensor, micro_batch_size: int, spread: Spread) -> list[float]:
    """Mean cross-entropy of each row, in nats per token."""
    losses: list[float] = []
    for part in rows.split(micro_batch_size):
        batch = row_batch(part)
        logprobs, _ = spread.call(lambda batch=batch: batch_logprobs(model, compute, batch))
        losses += (-logprobs.view(part.shape[0], -1).mean(dim=1)).tolist()
    return losses


def model_size(settings: PretrainSettings) -> ModelSize:
    size = find_size(settings.size)
    return size if settings.vocab_size is None else replace(size, vocab=settings.vocab_size)


def read_texts(settings: PretrainSettings) -> Texts:
    """Documents and the texts of conversations; the held-out part is the evaluation files', or the last 1 %."""
    policy = LoadPolicy.from_settings(settings)
    documents = load_documents(settings.data, policy)
    texts = [document.text for document in documents.rows]
    files = documents.files
    if settings.conversations:
        conversations = load_conversations(settings.conversations, policy)
        texts += ["\n\n".join(message.content for message in row.messages) for row in conversations.rows]
        files += conversations.files
    num_held_out = max(1, len(texts) // 100)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    shuffled = [texts[index] for index in order]
    return Texts(tuple(shuffled[num_held_out:]), tuple(shuffled[:num_held_out]), files)


def prepare_tokenizer(settings: PretrainSettings, texts: Texts, size: ModelSize, run_dir: Path) -> ModelTokenizer:
    """The given model's tokenizer, or a new one; kept in the run's directory, so that a resumed run has the same."""
    folder = run_dir / _TOKENIZER_FOLDER
    folder.mkdir(exist_ok=True)
    if settings.tokenizer is not None:
        copy_text_files(settings.tokenizer, folder)
    elif not (folder / "chat_template.jinja").is_file():
        write_tokenizer(train_tokenizer(texts.train, size.vocab), folder)
    return ModelTokenizer.load(folder)


def cut_rows(tokenizer: ModelTokenizer, texts: Sequence[str], length: int) -> Tensor:
    """(rows, length) int64: the texts one after the other, <|endoftext|> before each; what is left over is dropped."""
    start_id = next((token.token_id for token in tokenizer.added_tokens if token.text == END_OF_TEXT), None)
    start = [start_id] if start_id is not None else sorted(tokenizer.eos_ids)[:1]
    ids: list[Tensor] = [torch.tensor(start + tokenizer.encode(text), dtype=torch.int32) for text in texts]
    stream = torch.cat(ids)
    num_rows = stream.shape[0] // length
    if num_rows == 0:
        raise TrainingError(f"the texts have {stream.shape[0]:,} tokens; one row needs {length}: give more data")
    return stream[: num_rows * length].view(num_rows, length).to(torch.int64)


def build_model(size: ModelSize, tokenizer: ModelTokenizer, length: int) -> nn.Module:
    """Random weights by `initialise`, for contexts of `length` tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    vocab = max(size.vocab, tokenizer.vocab_size)
    values = config_of(replace(size, vocab=vocab, max_positions=length))
    values["eos_token_id"] = max(tokenizer.eos_ids)
    config = AutoConfig.for_model(str(values.pop("model_type")), **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    initialise(model, size.layers)
    return model


def initialise(model: nn.Module, num_layers: int) -> None:
    """Matrices by their inputs, PaLM section 5; what is added to the residual stream is smaller by its depth."""
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or "lm_head" in name:
            nn.init.normal_(parameter, std=_EMBEDDING_STD)
        elif parameter.dim() == 2:
            is_residual = "o_proj" in name or "down_proj" in name
            nn.init.normal_(parameter, std=(parameter.shape[1] * (2 * num_layers if is_residual else 1)) ** -0.5)
