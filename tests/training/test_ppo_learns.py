"""PPO finds the known optimum of a toy world, and does not with the advantage's sign flipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.training.rl_world import World, write_world
from training.data.load import LoadPolicy
from training.data.records import Prompt
from training.experience import Experience
from training.ppo import Ppo
from training.ppo_math import (
    chosen_logprobs,
    estimate_advantages,
    estimate_kl,
    masked_mean,
    masked_whiten,
    policy_losses,
    token_rewards,
    value_losses,
)
from training.ppo_models import load_models
from training.prompts import read_prompts, require_chat_format
from training.rollout import Trajectory
from training.trunk import choose_compute, inner_model

NUM_STATES, NUM_ACTIONS, LENGTH = 4, 5, 4
# The state is the place in the answer; one action is right at each. A sequence scores the share of right ones.
RIGHT = torch.tensor([3, 0, 4, 1])


def train_table(sign: float, num_iterations: int = 60) -> float:
    """Share of right actions of a tabular policy after PPO by the pure functions; the optimum is 1, chance is 1/5."""
    generator = torch.Generator().manual_seed(0)
    logits = nn.Parameter(torch.zeros(NUM_STATES, NUM_ACTIONS))
    baseline = nn.Parameter(torch.zeros(NUM_STATES))
    optimizer = torch.optim.Adam([logits, baseline], lr=0.1)
    lengths = torch.arange(32) % LENGTH + 1  # answers of unequal length, padded
    mask = torch.arange(LENGTH) < lengths[:, None]
    for _ in range(num_iterations):
        probabilities = logits.detach().softmax(-1).expand(32, -1, -1)
        actions = torch.multinomial(probabilities.reshape(-1, NUM_ACTIONS), 1, generator=generator).view(32, LENGTH)
        scores = ((actions == RIGHT) & mask).sum(1) / lengths
        old, old_values = chosen_logprobs(logits.detach().expand(32, -1, -1), actions), baseline.detach().expand(32, -1)
        kl = estimate_kl(old, torch.full_like(old, 1 / NUM_ACTIONS).log(), "k1")
        rewards = token_rewards(scores, kl, mask, 0.001)
        found = estimate_advantages(rewards, old_values, mask, 1.0, 0.95)
        advantages = sign * masked_whiten(found.advantages, mask)
        for _ in range(2):
            new = chosen_logprobs(logits.expand(32, -1, -1), actions)
            loss = masked_mean(policy_losses(new, old, advantages, mask, 0.2), mask)
            values = value_losses(baseline.expand(32, -1), old_values, found.returns, mask, 0.2)
            optimizer.zero_grad()
            (loss + masked_mean(values, mask)).backward()
            optimizer.step()
    return float(logits.detach().softmax(-1)[torch.arange(NUM_STATES), RIGHT].mean())


@pytest.mark.unit
def test_tabular_ppo_reaches_the_optimum() -> None:
    assert train_table(sign=1.0) > 0.95


@pytest.mark.unit
def test_tabular_ppo_with_the_sign_flipped_leaves_the_optimum() -> None:
    assert train_table(sign=-1.0) < 0.05


class WantedTokens:
    """A judge with a rule: the share of an answer's tokens that are wanted. Chance is about a half, the best is 1."""

    def __init__(self, is_wanted: Tensor) -> None:
        """is_wanted: (vocabulary,) bool."""
        self._is_wanted = is_wanted

    def score(self, trajectory: Trajectory, prompts: Sequence[Prompt], micro_batches: Sequence[Tensor]) -> Tensor:
        wanted = self._is_wanted[trajectory.ids] & trajectory.is_response
        return wanted.sum(1) / trajectory.is_response.sum(1)


class FlippedPpo(Ppo):
    def gather(self, iteration: int) -> tuple[Experience, dict[str, float]]:
        experience, values = super().gather(iteration)
        return replace(experience, advantages=-experience.advantages), dict(values)


def train_model(world: World, out: Path, kind: type[Ppo]) -> tuple[float, float]:
    """Mean score before and after some iterations of the whole machinery: engine, critic, KL penalty."""
    settings = world.ppo_settings(
        out,
        method="full",
        critic_from="policy",
        rollout_size=32,
        batch_size=16,
        micro_batch_size=16,
        max_new_tokens=6,
        iterations=20,
        epochs=2,
        learning_rate=4e-2,
        critic_learning_rate=1e-2,
        kl_coefficient=0.002,
        missing_end_penalty=0.0,
    )
    models = load_models(settings, choose_compute("cpu", "float32"))
    # Tokens on one side of the embeddings: a policy can want them all by moving one hidden direction.
    embeddings = inner_model(models.trunk.model).get_input_embeddings().weight.detach()
    models = replace(models, judge=WantedTokens(embeddings[:, 0] > 0))
    prompts = read_prompts(settings.data, LoadPolicy(), require_chat_format(models.trunk), max_tokens=100)
    ppo = kind(settings, models, prompts, None)
    rewards: list[float] = []
    for iteration in range(settings.iterations):
        experience, values = ppo.gather(iteration)
        rewards.append(values["reward"])
        for index in range(ppo.num_updates):
            ppo.update(experience, iteration, index)
        ppo.finish({**values, "policy_loss": 0.0}, settings.rollout_size)
    return rewards[0], rewards[-1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.mark.system
def test_a_model_learns_a_rule_and_unlearns_it_with_the_sign_flipped(world: World, tmp_path: Path) -> None:
    before, after = train_model(world, tmp_path / "out", Ppo)
    assert 0.4 < before < 0.6
    assert after > 0.9
    assert train_model(world, tmp_path / "flipped", FlippedPpo)[1] < 0.1
