from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.rl_world import PROMPTS, World, write_world
from training.dpo import DpoObjective, DpoRanking, read_data, run, with_reference
from training.dpo_loss import dpo_losses, implicit_rewards
from training.loop import accumulate
from training.run_log import read_log
from training.settings import DpoSettings
from training.trunk import choose_compute, load_trunk

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


def write_rankings(path: Path) -> Path:
    rows = [
        {
            "prompt": [{"role": "user", "content": text}],
            "answers": [
                {"text": f"{text} is thank you", "rank": 1},
                {"text": "print", "rank": 2},
                {"text": "the dog", "rank": 3},
            ],
        }
        for text in PROMPTS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dpo_settings(world: World, folder: Path, out: str, **changes: object) -> DpoSettings:
    values: dict[str, object] = {
        "model": world.model,
        "out": folder / out,
        "data": (write_rankings(folder / "rankings.jsonl"),),
        "precision": "float32",
        "lora_rank": 2,
        "batch_size": 2,
        "micro_batch_size": 1,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "held_out": 0.4,
        "epochs": 10.0,
    }
    return DpoSettings(**{**values, **changes})  # type: ignore[arg-type]


def test_loss_by_hand() -> None:
    """Policy twice as fond of the better answer as the reference, half as fond of the worse: margin beta * log 4."""
    two = math.log(2.0)
    better = implicit_rewards(torch.tensor([-1.0]), torch.tensor([-1.0 - two]), 0.5)
    worse = implicit_rewards(torch.tensor([-3.0]), torch.tensor([-3.0 + two]), 0.5)
    # sigmoid(log 2) = 2 / 3
    assert float(dpo_losses(better, worse)) == pytest.approx(-math.log(2 / 3))


def test_before_the_first_step_each_loss_is_log_2_and_passes_do_not_matter(world: World, tmp_path: Path) -> None:
    settings = dpo_settings(world, tmp_path, "out")
    compute = choose_compute("cpu", "float32")
    trunk = load_trunk(world.model, compute, settings)
    data = read_data(settings, trunk)
    assert all(len(ranking.answers) == 3 for ranking in data.train)
    gradients: list[torch.Tensor] = []
    for size in (1, 2):
        changed = dpo_settings(world, tmp_path, "out", micro_batch_size=size)
        objective = DpoObjective(trunk.model, compute, with_reference(data.train, trunk.model, compute, size), changed)
        values = accumulate(objective, objective.micro_batches(0)).values
        assert values["loss"] == pytest.approx(math.log(2.0), abs=1e-5)
        parameters = [p for p in trunk.model.parameters() if p.grad is not None]
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        trunk.model.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_targets_are_exactly_the_answer_with_its_end(world: World, tmp_path: Path) -> None:
    settings = dpo_settings(world, tmp_path, "out")
    trunk = load_trunk(world.model, choose_compute("cpu", "float32"), settings)
    [answer, *_] = read_data(settings, trunk).train[0].answers
    learned = [token for token, is_target in zip(answer.ids, answer.is_target, strict=True) if is_target]
    assert trunk.tokenizer.decode(learned).endswith(" is thank you")
    assert learned[-1] in trunk.tokenizer.eos_ids
    assert not answer.is_target[0]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_prefers_what_was_preferred_and_resumes_bit_for_bit(world: World, tmp_path: Path, method: str) -> None:
    whole = dpo_settings(world, tmp_path, "whole", method=method, checkpoint_every=2)
    run(whole)
    rows = read_log(whole.out)
    assert rows[0]["loss"] == pytest.approx(math.log(2.0), abs=1e-4)
    assert rows[-1]["loss"] < 0.6
    metrics = json.loads((whole.out / "causerie.json").read_text())["metrics"]
    assert metrics["held_out_loss"] < math.log(2.0)
    assert metrics["held_out_accuracy"] > 0.5


def test_a_resumed_run_keeps_the_reference_of_its_start(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dpo_settings(world, tmp_path, "whole")
    run(whole)
    stopped = replace(whole, out=tmp_path / "stopped")
    micro_batches = DpoObjective.micro_batches

    def interrupted(self: DpoObjective, step: int) -> Sequence[Sequence[DpoRanking]]:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return micro_batches(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(DpoObjective, "micro_batches", interrupted)
        run(stopped)
    assert not stopped.out.exists()
    run(replace(stopped, resume=True))
    assert (whole.out / "model.safetensors").read_bytes() == (stopped.out / "model.safetensors").read_bytes()
