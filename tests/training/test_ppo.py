"""Whole PPO runs on tiny models: resuming bit for bit, who shares weights with whom, and what is written."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from serving.engine.load import load_engine
from tests.training.rl_world import (
    World,
    make_ppo,
    shake_adapter,
    write_conversations,
    write_model,
    write_prompts,
    write_reward_model,
    write_texts,
    write_world,
)
from training.batches import Sample, pad_rows
from training.checkpoint import latest_checkpoint
from training.errors import TrainingError
from training.experience import Experience, plan_updates
from training.judge import IdJudge, TextJudge
from training.ppo import Ppo, run
from training.reward_model import RewardModel
from training.run_log import read_log
from training.settings import PpoSettings
from training.trunk import choose_compute

pytestmark = pytest.mark.unit

TIMES = {"seconds", "tokens_per_second"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


def rich_settings(world: World, folder: Path, out: str, method: str) -> PpoSettings:
    """Everything that carries state switched on: schedule, adaptive KL, PTX, entropy, several epochs."""
    return world.ppo_settings(
        folder / out,
        method=method,
        iterations=3,
        epochs=2,
        schedule="cosine",
        kl_coefficient=0.2,
        kl_target=0.05,
        kl_horizon=20,
        entropy_coefficient=0.01,
        ptx="mixture",
        ptx_text=(write_texts(folder / "texts.jsonl"),),
        ptx_conversations=(write_conversations(folder / "conversations.jsonl"),),
        ptx_batch_size=2,
        ptx_length=64,
    )


def interrupt_before(monkeypatch: pytest.MonkeyPatch, iteration: int, index: int) -> None:
    """Ctrl-C while the given optimizer step runs."""
    update = Ppo.update

    def interrupted(self: Ppo, experience: Experience, at: int, step: int) -> Mapping[str, float]:
        if (at, step) == (iteration, index):
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, experience, at, step)

    monkeypatch.setattr(Ppo, "update", interrupted)


def log_without_times(out: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_log(out)]


@pytest.mark.parametrize(
    ("method", "index"), [("lora", 1), ("lora", 3), ("full", 0)], ids=["lora-inside", "lora-border", "full-inside"]
)
def test_a_resumed_run_continues_bit_for_bit(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, index: int
) -> None:
    """Stopped inside an iteration or after its last step: weights, log and KL coefficient are those of one run."""
    whole = rich_settings(world, tmp_path, "whole", method)
    run(whole)
    stopped = replace(whole, out=tmp_path / "stopped")
    with monkeypatch.context() as patch:
        interrupt_before(patch, 1, index)
        run(stopped)
    assert not stopped.out.exists()
    checkpoint = latest_checkpoint(tmp_path / "stopped.run")
    assert checkpoint is not None
    # Nothing that is not a tensor or JSON.
    assert sorted(path.name for path in checkpoint.iterdir()) == ["state.json", "state.safetensors"]
    assert json.loads((checkpoint / "state.json").read_text())["update"] == (index + 1) % 4
    torch.manual_seed(12345)  # another process would have another generator
    run(replace(stopped, resume=True))
    assert log_without_times(whole.out) == log_without_times(stopped.out)
    assert len(log_without_times(whole.out)) == 3
    assert (whole.out / "model.safetensors").read_bytes() == (stopped.out / "model.safetensors").read_bytes()


def test_the_coefficient_moves_in_that_run(world: World, tmp_path: Path) -> None:
    """Else the test above would not see a controller that is not restored."""
    settings = rich_settings(world, tmp_path, "out", "lora")
    run(settings)
    coefficients = [row["kl_coefficient"] for row in read_log(settings.out)]
    assert len(set(coefficients)) == 3


def test_one_trunk_serves_policy_reference_reward_model_and_critic(world: World, tmp_path: Path) -> None:
    _, models = make_ppo(world.ppo_settings(tmp_path / "out"))
    assert isinstance(models.judge, IdJudge)
    bodies = [models.policy.body, models.reference.body, models.judge.body, models.critic.body]
    assert len({id(body.model) for body in bodies}) == 1
    assert [body.adapter for body in bodies] == ["default", None, "reward", "critic"]


def scored_rows() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 300, (length,), generator=generator).tolist() for length in (9, 4, 6)]
    return [Sample(tuple(row), (False,) * len(row)) for row in rows]


@pytest.mark.parametrize("which", ["adapted", "separate"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_judge_and_critic_start_as_the_reward_model_with_head_and_normalisation(
    world: World, tmp_path: Path, which: str, method: str
) -> None:
    """Through adapters on a shared trunk, on its own trunk or in full: the scores of the directory itself."""
    directory = world.adapted if which == "adapted" else world.separate
    _, models = make_ppo(world.ppo_settings(tmp_path / "out", reward_model=directory, method=method))
    expected = RewardModel.load(directory, choose_compute("cpu", "float32")).score_ids(
        [row.ids for row in scored_rows()]
    )
    batch = pad_rows(scored_rows())
    last = batch.sample_ids.sum(1) - 1
    assert isinstance(models.judge, IdJudge)
    with torch.no_grad():
        found = [role.head(role.body.hidden(batch)[torch.arange(3), last]) for role in (models.judge, models.critic)]
    assert torch.allclose(found[0], expected, atol=1e-4)
    assert torch.allclose(found[1], expected, atol=1e-4)
    assert models.critic.head.weight.requires_grad
    assert not models.judge.head.weight.requires_grad


@pytest.mark.parametrize("method", ["lora", "full"])
def test_reference_and_reward_model_never_change(world: World, tmp_path: Path, method: str) -> None:
    ppo, models = make_ppo(world.ppo_settings(tmp_path / "out", method=method))
    experience, _ = ppo.gather(0)
    passes = plan_updates(experience.trajectory.lengths(), micro_batch_size=2, batch_size=4, epochs=1).micro_batches
    batch = experience.trajectory.batch(torch.arange(6))

    def look() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.no_grad():
            return (
                models.reference.logprobs(batch),
                models.judge.score(experience.trajectory, (), passes),
                models.policy.logprobs(batch),
                models.critic.values(batch),
            )

    before = look()
    for index in range(ppo.num_updates):
        ppo.update(experience, 0, index)
    after = look()
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[2], after[2])
    assert not torch.equal(before[3], after[3])


def test_divergence_is_0_exactly_before_the_first_update(world: World, tmp_path: Path) -> None:
    for method in ("lora", "full"):
        ppo, _ = make_ppo(world.ppo_settings(tmp_path / "out", method=method, precision="bfloat16"))
        _, values = ppo.gather(0)
        assert values["kl_per_token"] == 0


def test_only_the_critic_learns_while_it_warms_up(world: World, tmp_path: Path) -> None:
    ppo, models = make_ppo(world.ppo_settings(tmp_path / "out", critic_warmup=1, iterations=2, kl_control="adaptive"))
    roles = (models.policy.body, models.critic)
    before = [[parameter.detach().clone() for parameter in role.parameters()] for role in roles]
    experience, gathered = ppo.gather(0)
    values = ppo.update(experience, 0, 0)
    ppo.finish({**gathered, **values}, 6)
    changed = [
        any(not torch.equal(a, b) for a, b in zip(old, role.parameters(), strict=True))
        for old, role in zip(before, roles, strict=True)
    ]
    assert changed == [False, True]
    assert ppo.gather(1)[1]["kl_coefficient"] == gathered["kl_coefficient"]
    assert "policy_loss" in ppo.update(experience, 1, 0)


def test_a_reward_model_with_another_tokenizer_is_given_text(world: World, tmp_path: Path) -> None:
    other = write_model(tmp_path / "qwen", family="qwen3", seed=3)
    reward_model = write_reward_model(tmp_path / "reward", other)
    settings = world.ppo_settings(tmp_path / "out", reward_model=reward_model)
    with pytest.raises(TrainingError, match="--critic-from policy"):
        make_ppo(settings)
    ppo, models = make_ppo(replace(settings, critic_from="policy"))
    assert isinstance(models.judge, TextJudge)
    experience, values = ppo.gather(0)
    assert experience.critic is not None
    assert experience.critic.old_values.abs().max() == 0
    assert "policy_loss" in ppo.update(experience, 0, 0)
    assert values["reward"] == pytest.approx(float(experience.scores.mean()))


def test_what_is_written_is_the_policy_and_the_engine_serves_it(world: World, tmp_path: Path) -> None:
    held_out = write_prompts(tmp_path / "held_out.jsonl", ("good morning", "the quick fox"))
    settings = world.ppo_settings(tmp_path / "out", iterations=1, eval_data=(held_out,))
    run(settings)
    manifest = json.loads((settings.out / "causerie.json").read_text())
    assert manifest["stage"] == "ppo"
    assert [parent["name"] for parent in manifest["parents"]] == ["sft", "adapted"]
    assert manifest["metrics"]["held_out_rows"] == 2
    assert (settings.out / "adapter" / "adapter_model.safetensors").is_file()
    assert not [path for path in (settings.out / "adapter").iterdir() if path.is_dir()]
    assert not list((tmp_path / "out.run").glob("checkpoint-*"))
    assert load_engine(settings.out, kv_bytes=2**20, exact=True).max_context == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_dropout": 0.1}, "lora-dropout"),
        ({"sharding": "fsdp"}, "one process"),
        ({"critic_warmup": 50}, "leaves none"),
        ({"batch_size": 7}, "more than the 6 answers"),
        ({"ptx": "mixture"}, "names no file"),
        ({"ptx": "mixture", "ptx_coefficient": 0.0, "ptx_text_share": 1.0}, "names no file|no effect"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    world: World, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        run(world.ppo_settings(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_switching_adapters_keeps_what_learns(world: World, tmp_path: Path) -> None:
    _, models = make_ppo(world.ppo_settings(tmp_path / "out"))
    shake_adapter(models.trunk.model, "default")
    marks = [parameter.requires_grad for parameter in models.trunk.model.parameters()]
    batch = pad_rows(scored_rows())
    with torch.no_grad():
        hidden = [role.body.hidden(batch) for role in (models.policy, models.reference, models.critic, models.policy)]
    assert marks == [parameter.requires_grad for parameter in models.trunk.model.parameters()]
    assert torch.equal(hidden[0], hidden[3])
    assert all(not torch.equal(hidden[0], other) for other in hidden[1:3])
