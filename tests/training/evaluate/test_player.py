"""Log-probabilities from the engine against transformers, for both architectures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quant.errors import CheckpointError
from quant.progress import SilentProgress
from tests.training.evaluate.tiny_models import write_palm
from training.errors import TrainingError
from training.evaluate.player import Player, load_player

pytestmark = pytest.mark.unit

SEQUENCES = [[5, 9, 40, 200, 7, 31], [3, 4], [100, 20, 30, 40, 50, 60, 70, 80]]


def reference_logprobs(directory: Path, ids: list[int]) -> list[float]:
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(logprobs[i, ids[i + 1]]) for i in range(len(ids) - 1)]


def test_scores_are_transformers_own(model: Path, player: Player) -> None:
    found = player.logprobs(SEQUENCES, SilentProgress(), "scoring")
    for ids, values in zip(SEQUENCES, found, strict=True):
        assert values == pytest.approx(reference_logprobs(model, ids), abs=1e-4)


def test_a_palm_is_scored_too(tmp_path: Path) -> None:
    directory = write_palm(tmp_path / "palm")
    palm = load_player(directory, precision="float32", kv_megabytes=8)
    (found,) = palm.logprobs(SEQUENCES[:1], SilentProgress(), "scoring")
    assert found == pytest.approx(reference_logprobs(directory, SEQUENCES[0]), abs=1e-4)


def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no model directory"):
        load_player(tmp_path / "none", precision="float32", kv_megabytes=8)


def test_a_base_model_scores_but_does_not_answer(model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in model.iterdir():
        if file.name != "chat_template.jinja":
            (base / file.name).write_bytes(file.read_bytes())
    loaded = load_player(base, precision="float32", kv_megabytes=8)
    assert len(loaded.logprobs(SEQUENCES[:1], SilentProgress(), "scoring")[0]) == 5
    with pytest.raises(TrainingError, match="base has no chat template"):
        loaded.chat()
