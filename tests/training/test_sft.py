"""SFT from files to a directory: what the loss is on, what is cut, held out and refused, and going on after a stop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quant.model_directory import hash_directory, read_manifest
from serving.model.chat_format import ChatFormat, ChatMessage
from serving.model.tokenizer import ModelTokenizer
from tests.training.data.row_files import chat, write_rows
from tests.training.tiny_directory import write_tiny_directory
from training import loop, sft
from training.errors import TrainingError
from training.options import build_settings
from training.settings import SftSettings
from training.tokenizer import CHAT_TEMPLATE

pytestmark = pytest.mark.unit


def settings(tmp_path: Path, **changes: object) -> SftSettings:
    values: dict[str, object] = {
        "out": tmp_path / "out",
        "model": tmp_path / "model",
        "data": [tmp_path / "data.jsonl"],
        "method": "full",
        "precision": "float32",
        "length": 64,
        "batch_size": 2,
        "max_steps": 4,
        "learning_rate": 3e-3,
        "checkpoint_every": 100,
    }
    return build_settings(SftSettings, {**values, **changes})


def write_inputs(tmp_path: Path, *, is_base: bool = False) -> None:
    write_tiny_directory(tmp_path / "model", is_base=is_base)
    rows = [chat(f"What sat, number {n}?", f"The cat number {n} sat.", source="dolly_15k_part") for n in range(30)]
    write_rows(tmp_path / "data.jsonl", *rows)


def chat_format(tmp_path: Path) -> tuple[ChatFormat, ModelTokenizer]:
    tokenizer = ModelTokenizer.load(write_tiny_directory(tmp_path / "format"))
    return ChatFormat.load(tmp_path / "format", tokenizer), tokenizer


def test_the_loss_is_on_exactly_what_the_assistant_writes(tmp_path: Path) -> None:
    renderer, tokenizer = chat_format(tmp_path)
    messages = [
        ChatMessage("user", "the cat"),
        ChatMessage("assistant", "a mat"),
        ChatMessage("user", "a dog"),
        ChatMessage("assistant", "sat"),
    ]
    sample = sft.render_sample(messages, renderer, 200)
    assert sample is not None
    marked = [token for token, is_target in zip(sample.ids, sample.is_target, strict=True) if is_target]
    assert tokenizer.decode(marked, skip_special=False) == "a mat<|im_end|>sat<|im_end|>"


def test_a_long_conversation_loses_its_last_turns(tmp_path: Path) -> None:
    renderer, _ = chat_format(tmp_path)
    messages = [
        ChatMessage("user", "the cat"),
        ChatMessage("assistant", "a mat"),
        ChatMessage("user", "a dog"),
        ChatMessage("assistant", "sat"),
    ]
    first_turn = sft.render_sample(messages[:2], renderer, 200)
    assert first_turn is not None
    assert sft.render_sample(messages, renderer, len(first_turn.ids)) == first_turn
    assert sft.render_sample(messages, renderer, len(first_turn.ids) - 1) is None


def test_training_lowers_the_held_out_loss_and_says_from_what_it_came(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    sft.run(settings(tmp_path, max_steps=12))
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.stage == "sft"
    assert manifest.parents[0].sha256 == hash_directory(tmp_path / "model")
    assert manifest.data[0].rows == 30
    assert float(str(manifest.metrics["held_out_loss"])) < float(str(manifest.metrics["held_out_loss_before"]))
    assert manifest.chat_format_sha256 is not None
    assert "resume" not in manifest.config
    assert (tmp_path / "out" / "training.png").stat().st_size > 1000
    ChatFormat.load(tmp_path / "out", ModelTokenizer.load(tmp_path / "out"))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_stopped_and_resumed_writes_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    write_inputs(tmp_path)
    extra = {"lora_dropout": 0.1} if method == "lora" else {}
    whole = settings(tmp_path, method=method, out=tmp_path / "whole", **extra)
    sft.run(whole)
    parts = replace(whole, out=tmp_path / "parts")
    step = loop._one_step

    def one_step_then_stop(learner: loop.Learner, *rest: object) -> dict[str, float]:
        values = step(learner, *rest)  # pyright: ignore[reportArgumentType]
        if learner.step == 2:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)
        return values

    monkeypatch.setattr(loop, "_one_step", one_step_then_stop)
    sft.run(parts)
    assert not (tmp_path / "parts").exists()
    monkeypatch.setattr(loop, "_one_step", step)
    sft.run(replace(parts, resume=True))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_base_model_needs_a_template_and_keeps_it(tmp_path: Path) -> None:
    write_inputs(tmp_path, is_base=True)
    with pytest.raises(TrainingError, match="has no chat format; say how to write a chat: --chat-template"):
        sft.run(settings(tmp_path))
    (tmp_path / "t.jinja").write_text(CHAT_TEMPLATE)
    sft.run(settings(tmp_path, chat_template=tmp_path / "t.jinja", out=tmp_path / "out2", max_steps=1))
    assert (tmp_path / "out2" / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_held_out_rows_are_not_learned_from(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    chosen = settings(tmp_path)
    trunk = sft.with_chat_format(sft.load_trunk(chosen.model, sft.choose_compute("cpu", "float32"), chosen), chosen)
    data = sft.read_data(chosen, trunk)
    assert len(data.held_out) == 1
    assert len(data.train) == 29
    assert not set(data.train) & set(data.held_out)


def test_without_packing_each_conversation_has_its_row(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    chosen = settings(tmp_path)
    trunk = sft.load_trunk(chosen.model, sft.choose_compute("cpu", "float32"), chosen)
    samples = sft.read_data(chosen, trunk).train
    assert [list(row) for row in sft.make_rows(samples, replace(chosen, packing=False))] == [[s] for s in samples]
    packed = sft.make_rows(samples, replace(chosen, length=200))
    assert len(packed) < len(samples)
    assert sum(map(len, packed)) == len(samples)


def test_the_log_has_a_row_for_each_step(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    sft.run(settings(tmp_path))
    header, *rows = (tmp_path / "out" / "log.csv").read_text().splitlines()
    assert header.split(",")[:2] == ["step", "loss"]
    assert len(rows) == 4
    assert list((tmp_path / "out.run" / "tensorboard").glob("events.*"))
    assert json.loads((tmp_path / "out" / "causerie.json").read_text())["seed"] == 0
