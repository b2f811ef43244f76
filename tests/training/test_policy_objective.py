"""The losses on real models: ratio 1 before the first update, and no trace of padding or of the batching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.training.rl_world import World, make_ppo, shake_adapter, write_world
from training.batches import Batch
from training.experience import CriticTargets, Experience, place_responses, plan_updates
from training.loop import accumulate
from training.policy_objective import CriticObjective, OverAnswers, PolicyObjective
from training.ppo_models import PpoModels
from training.rollout import Trajectory

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("method", "checkpointing"), [("lora", False), ("full", True)])
def test_ratio_is_1_on_every_real_token_before_the_first_update(
    world: World, tmp_path: Path, method: str, checkpointing: bool, precision: str
) -> None:
    settings = world.ppo_settings(
        tmp_path / "out", method=method, precision=precision, temperature=0.7, gradient_checkpointing=checkpointing
    )
    ppo, models = make_ppo(settings)
    experience, _ = ppo.gather(0)
    plan = plan_updates(experience.trajectory.lengths(), micro_batch_size=2, batch_size=4, epochs=1)
    for rows in plan.micro_batches:
        batch = experience.trajectory.batch(rows)
        new = place_responses(batch.is_target, models.policy.logprobs(batch))
        assert new.requires_grad
        ratio = (new - experience.old_logprobs[rows, : batch.input_ids.shape[1]]).exp()
        assert (ratio - 1).abs().max() <= 1e-6


def unequal_answers(models: PpoModels) -> Experience:
    """Prompts of 3, 2 and 5 tokens with answers of 4, 9 and 1, and numbers at the sampled tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, models.trunk.tokenizer.vocab_size, (3, 11), generator=generator)
    columns = torch.arange(11)
    starts, ends = torch.tensor([[3], [2], [5]]), torch.tensor([[7], [11], [6]])
    is_token, is_response = columns < ends, (columns >= starts) & (columns < ends)

    def numbers(scale: float) -> Tensor:
        return torch.where(is_response, torch.randn(3, 11, generator=generator) * scale, 0.0)

    zeros = torch.zeros(3, 11)
    path = Trajectory(
        torch.where(is_token, ids, 0), is_token, is_response, zeros, torch.tensor([True] * 3), torch.arange(3)
    )
    old = numbers(0.1) - torch.where(is_response, 6.0, 0.0)
    return Experience(
        path, torch.zeros(3), old, old + numbers(0.1), numbers(1.0), CriticTargets(numbers(1), numbers(1))
    )


def with_pad_columns(experience: Experience, count: int) -> Experience:
    """Wider by columns of garbage that no mask marks."""

    def wider(tensor: Tensor, fill: float) -> Tensor:
        return torch.cat((tensor, torch.full((3, count), fill).to(tensor.dtype)), dim=1)

    path, critic = experience.trajectory, experience.critic
    assert critic is not None
    return replace(
        experience,
        trajectory=replace(
            path,
            ids=wider(path.ids, 77),
            is_token=wider(path.is_token, False),
            is_response=wider(path.is_response, False),
            engine_logprobs=wider(path.engine_logprobs, 9.0),
        ),
        old_logprobs=wider(experience.old_logprobs, 9.0),
        reference_logprobs=wider(experience.reference_logprobs, -9.0),
        advantages=wider(experience.advantages, 9.0),
        critic=CriticTargets(wider(critic.old_values, 9.0), wider(critic.returns, -9.0)),
    )


def whole_batch(path: Trajectory, rows: Tensor) -> Batch:
    """`Trajectory.batch` without cutting columns, with the ids that lie under padding."""
    is_token = path.is_token[rows]
    positions = torch.arange(is_token.shape[1]).expand_as(is_token)
    return Batch(path.ids[rows], torch.where(is_token, positions, 0), is_token.long(), path.is_response[rows])


def make_objectives(models: PpoModels, experience: Experience, micro_batch_size: int) -> Sequence[OverAnswers]:
    plan = plan_updates(experience.trajectory.lengths(), micro_batch_size=micro_batch_size, batch_size=4, epochs=1)
    policy = PolicyObjective(
        models.policy, experience, plan, 0, clip=0.2, entropy_coefficient=0.05, kl_loss_coefficient=0.1
    )
    return policy, CriticObjective(models.critic, experience, plan, 0, clip=0.2)


def loss_and_gradients(objective: OverAnswers, parameters: Sequence[nn.Parameter]) -> tuple[float, list[Tensor]]:
    assert isinstance(objective, PolicyObjective | CriticObjective)
    for parameter in parameters:
        parameter.grad = None
    result = accumulate(objective, objective.micro_batches(0))
    gradients = [parameter.grad for parameter in parameters]
    assert all(gradient is not None for gradient in gradients)
    return result.values["loss"], [gradient.clone() for gradient in gradients if gradient is not None]


@pytest.fixture
def models(world: World, tmp_path: Path) -> PpoModels:
    _, models = make_ppo(world.ppo_settings(tmp_path / "out"))
    shake_adapter(models.trunk.model, "default")
    return models


def parameters_of(models: PpoModels) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    return models.policy.body.parameters(), models.critic.parameters()


def assert_same(first: tuple[float, list[Tensor]], second: tuple[float, list[Tensor]]) -> None:
    assert first[0] == pytest.approx(second[0], rel=1e-5)
    assert any(gradient.abs().max() > 1e-4 for gradient in first[1])
    torch.testing.assert_close(second[1], first[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("which", [0, 1], ids=["policy", "critic"])
def test_pad_columns_change_neither_the_loss_nor_a_gradient(
    models: PpoModels, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    monkeypatch.setattr(Trajectory, "batch", whole_batch)
    plain = unequal_answers(models)
    results = [
        loss_and_gradients(make_objectives(models, experience, 3)[which], parameters_of(models)[which])
        for experience in (plain, with_pad_columns(plain, 6))
    ]
    assert_same(results[0], results[1])


@pytest.mark.parametrize("which", [0, 1], ids=["policy", "critic"])
def test_answers_together_give_the_gradient_of_each_alone(models: PpoModels, which: int) -> None:
    """One pass of three answers of unequal length, or three passes: the weights are tokens, not passes."""
    experience = unequal_answers(models)
    together, alone = (
        loss_and_gradients(make_objectives(models, experience, size)[which], parameters_of(models)[which])
        for size in (3, 1)
    )
    assert_same(together, alone)


def test_each_role_has_gradients_of_its_own_only(models: PpoModels) -> None:
    policy, critic = parameters_of(models)
    objectives = make_objectives(models, unequal_answers(models), 3)
    loss_and_gradients(objectives[0], policy)
    assert all(parameter.grad is None for parameter in critic)
    others = [p for p in models.trunk.model.parameters() if not any(p is own for own in (*policy, *critic))]
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in others)
    assert not {id(parameter) for parameter in policy} & {id(parameter) for parameter in critic}


def test_entropy_bonus_pushes_entropy_up(models: PpoModels) -> None:
    experience = unequal_answers(models)
    experience = replace(experience, advantages=torch.zeros_like(experience.advantages))
    plan = plan_updates(experience.trajectory.lengths(), micro_batch_size=3, batch_size=4, epochs=1)
    objective = PolicyObjective(models.policy, experience, plan, 0, clip=0.2, entropy_coefficient=1.0)
    parameters = models.policy.body.parameters()
    batch = experience.trajectory.batch(torch.arange(3))

    def entropy() -> float:
        _, entropies = models.policy.logprobs_and_entropy(batch)
        assert entropies is not None
        return float(entropies.detach().sum())

    before = entropy()
    _, gradients = loss_and_gradients(objective, parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(gradient, alpha=0.1)
    assert entropy() > before
