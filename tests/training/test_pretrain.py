"""Pretraining from text to a base model: rows without padding, PaLM's scale, z-loss, and going on after a stop."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quant.model_directory import read_manifest
from serving.model.tokenizer import ModelTokenizer
from tests.training.data.row_files import chat, document, write_rows
from tests.training.tiny_directory import CPU, LENGTH, TEXTS, TINY_SIZE, write_tiny_directory
from training import pretrain, sizes
from training.distributed import ALONE
from training.errors import TrainingError
from training.options import build_settings
from training.packed import PackedObjective
from training.settings import PretrainSettings

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "SIZES", {**sizes.SIZES, "tiny": replace(TINY_SIZE, name="tiny")})


def settings(tmp_path: Path, **changes: object) -> PretrainSettings:
    values: dict[str, object] = {
        "out": tmp_path / "out",
        "data": [tmp_path / "text.jsonl"],
        "size": "tiny",
        "precision": "float32",
        "length": 32,
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 3e-3,
    }
    return build_settings(PretrainSettings, {**values, **changes})


def write_text(tmp_path: Path) -> None:
    write_rows(tmp_path / "text.jsonl", *(document(text + " " + text[::-1]) for text in TEXTS))
    write_rows(tmp_path / "chat.jsonl", *(chat(f"Where did hen {n} go?", "Over the hill.") for n in range(9)))


def test_a_base_model_is_written_with_its_tokenizer(tmp_path: Path) -> None:
    write_text(tmp_path)
    pretrain.run(settings(tmp_path, conversations=[tmp_path / "chat.jsonl"]))
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.stage == "pretrain"
    assert [file.name for file in manifest.data] == ["text.jsonl", "chat.jsonl"]
    assert float(str(manifest.metrics["held_out_loss"])) < float(str(manifest.metrics["held_out_loss_before"]))
    tokenizer = ModelTokenizer.load(tmp_path / "out")
    assert tokenizer.vocab_size == TINY_SIZE.vocab
    text = "The cat, 23 of them; und ein Löwe 猫"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    write_text(tmp_path)
    whole = settings(tmp_path, out=tmp_path / "whole", max_steps=4)
    pretrain.run(whole)
    parts = replace(whole, out=tmp_path / "parts", checkpoint_every=2)
    import training.loop as loop

    save = loop.save

    def save_then_die(learner: loop.Learner, run_dir: Path, keep: int) -> None:
        save(learner, run_dir, keep)
        raise KeyboardInterrupt  # as if killed right after a checkpoint

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            pretrain.run(parts)
    pretrain.run(replace(parts, resume=True))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_rows_hold_every_token_in_order(tmp_path: Path) -> None:
    tokenizer = ModelTokenizer.load(write_tiny_directory(tmp_path / "model"))
    rows = pretrain.cut_rows(tokenizer, TEXTS, 16)
    start = next(token.token_id for token in tokenizer.added_tokens if token.text == "<|endoftext|>")
    stream = [token for text in TEXTS for token in [start, *tokenizer.encode(text)]]
    assert rows.flatten().tolist() == stream[: rows.numel()]
    assert len(stream) - rows.numel() < 16


def test_too_little_text_is_refused_with_the_number(tmp_path: Path) -> None:
    tokenizer = ModelTokenizer.load(write_tiny_directory(tmp_path / "model"))
    with pytest.raises(TrainingError, match="one row needs 512: give more data"):
        pretrain.cut_rows(tokenizer, TEXTS[:1], 512)


def test_logits_start_at_about_one(tmp_path: Path) -> None:
    tokenizer = ModelTokenizer.load(write_tiny_directory(tmp_path / "model"))
    torch.manual_seed(0)
    model = pretrain.build_model(TINY_SIZE, tokenizer, LENGTH)
    logits = model(input_ids=torch.arange(100)[None]).logits
    assert 0.5 < float(logits.detach().std()) < 2


def test_z_loss_is_added_with_its_coefficient(tmp_path: Path) -> None:
    tokenizer = ModelTokenizer.load(write_tiny_directory(tmp_path / "model"))
    model = pretrain.build_model(TINY_SIZE, tokenizer, LENGTH)
    rows = torch.randint(0, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    data = pretrain.TextRows(rows, 2, 2, 0)
    (batch,) = data.micro_batches(0)
    plain, _ = PackedObjective(model, CPU, data).loss(batch)
    with_z, values = PackedObjective(model, CPU, data, z_loss=0.5).loss(batch)
    log_z = model(input_ids=batch.input_ids).logits[:, :-1].logsumexp(-1)
    torch.testing.assert_close(with_z - plain, 0.5 * log_z.square().sum())
    assert math.isclose(values["cross_entropy"], float(plain.detach()), rel_tol=1e-5)


def test_row_losses_are_the_models_own(tmp_path: Path) -> None:
    tokenizer = ModelTokenizer.load(write_tiny_directory(tmp_path / "model"))
    model = pretrain.build_model(TINY_SIZE, tokenizer, LENGTH)
    rows = torch.randint(0, 200, (3, 16), generator=torch.Generator().manual_seed(0))
    found = pretrain.row_losses(model, CPU, rows, 2, ALONE)
    expected = [float(model(input_ids=row[None], labels=row[None]).loss.detach()) for row in rows]
    assert found == pytest.approx(expected, rel=1e-4)


def test_another_models_tokenizer_is_taken_over(tmp_path: Path) -> None:
    write_text(tmp_path)
    source = write_tiny_directory(tmp_path / "model")
    pretrain.run(settings(tmp_path, tokenizer=source, max_steps=1))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
