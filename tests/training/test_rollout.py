"""What is sampled is what is learned from: ids, weights, temperature and ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from serving.model.tokenizer import ModelTokenizer
from tests.training.rl_world import World, make_ppo, shake_adapter, write_world
from training.errors import TrainingError
from training.experience import at_responses
from training.rollout import Answer, Sampler, Trajectory, make_trajectory

pytestmark = pytest.mark.unit

PROMPTS = ((5, 6, 7), (8, 9), (10, 11, 12, 13, 14))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


def sample(sampler: Sampler, seeds: Sequence[int] = (1, 2, 3)) -> Trajectory:
    return sampler.sample(PROMPTS, seeds, range(len(PROMPTS)))


class DeafTokenizer(ModelTokenizer):
    """Knows where answers end, and fails whoever turns ids into text or text into ids."""

    def __init__(self, eos_ids: frozenset[int]) -> None:
        self.eos_ids = eos_ids

    def encode(self, text: str) -> list[int]:
        raise AssertionError("text was encoded during a roll-out")

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        raise AssertionError("ids were decoded during a roll-out")


def test_rows_are_prompt_then_answer_then_padding() -> None:
    answers = [Answer((50, 51), (-1.0, -2.0), True), Answer((60, 61, 62, 63), (-3.0, -4.0, -5.0, -6.0), False)]
    trajectory = make_trajectory(PROMPTS[:2], answers, [4, 2])
    assert trajectory.ids.tolist() == [[5, 6, 7, 50, 51, 0], [8, 9, 60, 61, 62, 63]]
    assert trajectory.is_token.long().tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert trajectory.is_response.long().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert trajectory.engine_logprobs.tolist() == [[0, 0, 0, -1, -2, 0], [0, 0, -3, -4, -5, -6]]
    assert trajectory.has_end.tolist() == [True, False]
    assert trajectory.prompt_index.tolist() == [4, 2]
    assert trajectory.response_ids(1) == [60, 61, 62, 63]


def test_a_batch_drops_columns_that_its_rows_do_not_need() -> None:
    answers = [Answer((50,), (-1.0,), True), Answer((60, 61, 62, 63), (-3.0, -4.0, -5.0, -6.0), False)]
    batch = make_trajectory(PROMPTS[:2], answers, [0, 1]).batch(torch.tensor([0]))
    assert batch.input_ids.tolist() == [[5, 6, 7, 50]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]]
    assert batch.is_target.tolist() == [[False, False, False, True]]


def test_an_empty_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="0 sampled"):
        make_trajectory(PROMPTS[:1], [Answer((), (), False)], [0])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_sampled_ids_are_never_text_on_the_way(world: World, tmp_path: Path, method: str) -> None:
    """Random answers would not survive it: encoding their text gives other ids."""
    ppo, models = make_ppo(world.ppo_settings(tmp_path / "out", method=method))
    tokenizer = models.trunk.tokenizer
    deaf = replace(models.trunk, tokenizer=DeafTokenizer(tokenizer.eos_ids))
    sampler = Sampler(deaf, world.ppo_settings(tmp_path / "out"), adapter=models.policy.body.adapter)
    trajectory, expected = sample(sampler), sample(ppo.sampler)
    assert torch.equal(trajectory.ids, expected.ids)
    answers = [trajectory.response_ids(row) for row in range(trajectory.num_rows)]
    assert any(tokenizer.encode(tokenizer.decode(answer, skip_special=False)) != answer for answer in answers)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_engine_samples_from_the_present_weights_at_the_temperature(
    world: World, tmp_path: Path, method: str
) -> None:
    """Its log-probabilities are those of the training forward, before and after the weights change."""
    ppo, models = make_ppo(world.ppo_settings(tmp_path / "out", method=method, temperature=0.6))
    first = sample(ppo.sampler)
    if method == "lora":
        shake_adapter(models.trunk.model, "default")
    else:
        with torch.no_grad():
            for parameter in models.policy.body.parameters():
                parameter.mul_(1.3)
    second = sample(ppo.sampler)
    rows = [torch.arange(3)]
    now = at_responses(second, rows, models.policy.logprobs)
    assert torch.allclose(second.engine_logprobs, now, atol=1e-4)
    stale = at_responses(first, rows, models.policy.logprobs)
    assert (first.engine_logprobs - stale).abs().max() > 0.05


def test_same_weights_and_seeds_draw_the_same_answers(world: World, tmp_path: Path) -> None:
    ppo, _ = make_ppo(world.ppo_settings(tmp_path / "out"))
    first, again, other = (sample(ppo.sampler, seeds) for seeds in ((1, 2, 3), (1, 2, 3), (4, 5, 6)))
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.engine_logprobs, again.engine_logprobs)
    assert not torch.equal(first.ids, other.ids)


def test_an_answer_ends_with_the_first_end_that_is_drawn(world: World, tmp_path: Path) -> None:
    ppo, models = make_ppo(world.ppo_settings(tmp_path / "out"))
    before = sample(ppo.sampler)
    end = before.response_ids(0)[3]
    ends_there = replace(models.trunk, tokenizer=DeafTokenizer(frozenset({end})))
    after = sample(Sampler(ends_there, world.ppo_settings(tmp_path / "out"), adapter="default"))
    assert after.response_ids(0) == before.response_ids(0)[: before.response_ids(0).index(end) + 1]
    assert after.has_end[0]
    uncut = [row for row in range(3) if end not in before.response_ids(row)]
    assert uncut
    assert all(len(after.response_ids(row)) == 8 and not after.has_end[row] for row in uncut)


def test_a_prompt_without_room_for_an_answer_is_refused(world: World, tmp_path: Path) -> None:
    ppo, _ = make_ppo(world.ppo_settings(tmp_path / "out"))
    with pytest.raises(TrainingError, match="leaves no room for an answer"):
        ppo.sampler.sample([[5] * 256], [1], [0])
