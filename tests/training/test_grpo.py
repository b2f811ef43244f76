from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.rl_world import World, write_prompts, write_world
from training.errors import TrainingError
from training.experience import Experience
from training.grpo import Grpo, answer_advantages, run
from training.rollout import Answer, make_trajectory
from training.run_log import read_log
from training.settings import GrpoSettings

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


def grpo_settings(world: World, folder: Path, out: str, **changes: Any) -> GrpoSettings:
    values: dict[str, Any] = {
        "model": world.model,
        "reward_model": world.separate,
        "out": folder / out,
        "data": (world.prompts,),
        "precision": "float32",
        "lora_rank": 2,
        "iterations": 2,
        "prompts_per_iteration": 2,
        "group_size": 3,
        "batch_size": 3,
        "micro_batch_size": 3,
        "epochs": 2,
        "max_new_tokens": 6,
        "learning_rate": 1e-2,
    }
    return GrpoSettings(**{**values, **changes})


def test_an_answers_advantage_stands_at_each_of_its_tokens_and_nowhere_else(world: World, tmp_path: Path) -> None:
    answers = [Answer((50,) * length, (-1.0,) * length, True) for length in (1, 3, 2)]
    trajectory = make_trajectory([(5, 6)] * 3, answers, [0, 0, 0])
    settings = grpo_settings(world, tmp_path, "out", divide_by_deviation=False)
    found = answer_advantages(trajectory, torch.tensor([1.0, 2.0, 6.0]), settings)
    assert found.tolist() == [[0, 0, -2, 0, 0], [0, 0, -1, -1, -1], [0, 0, 3, 3, 0]]


def test_a_cut_off_answer_is_penalised_before_it_is_compared(world: World, tmp_path: Path) -> None:
    answers = [Answer((50,), (-1.0,), has_end) for has_end in (True, False, True)]
    trajectory = make_trajectory([(5, 6)] * 3, answers, [0, 0, 0])
    settings = grpo_settings(world, tmp_path, "out", divide_by_deviation=False, missing_end_penalty=3.0)
    assert answer_advantages(trajectory, torch.ones(3), settings)[:, 2].tolist() == [1.0, -2.0, 1.0]


def test_a_group_answers_one_prompt_and_the_run_resumes_bit_for_bit(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = write_prompts(tmp_path / "held_out.jsonl", ("good morning",))
    whole = grpo_settings(world, tmp_path, "whole", eval_data=(held_out,))
    run(whole)
    stopped = replace(whole, out=tmp_path / "stopped")
    update = Grpo.update

    def interrupted(self: Grpo, experience: Experience, at: int, step: int) -> Mapping[str, float]:
        groups = experience.trajectory.prompt_index.view(-1, 3)
        assert bool((groups == groups[:, :1]).all())
        if (at, step) == (1, 1):
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, experience, at, step)

    with monkeypatch.context() as patch:
        patch.setattr(Grpo, "update", interrupted)
        run(stopped)
    assert not stopped.out.exists()
    run(replace(stopped, resume=True))
    times = {"seconds", "tokens_per_second"}
    logs = [[{k: v for k, v in row.items() if k not in times} for row in read_log(s.out)] for s in (whole, stopped)]
    assert logs[0] == logs[1]
    assert (whole.out / "model.safetensors").read_bytes() == (stopped.out / "model.safetensors").read_bytes()
    assert json.loads((whole.out / "causerie.json").read_text())["stage"] == "grpo"


def test_a_step_of_more_answers_than_an_iteration_has_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="more than the 6 answers"):
        run(grpo_settings(world, tmp_path, "out", batch_size=7))
