from __future__ import annotations

import pytest
import torch

from training.batches import Batch
from training.experience import (
    CriticTargets,
    Experience,
    at_responses,
    at_rows,
    experience_from,
    place_responses,
    plan_updates,
)
from training.ppo_experience import describe, make_experience
from training.rollout import Answer, Trajectory, make_trajectory
from training.settings import PpoSettings

pytestmark = pytest.mark.unit

ANSWERS = [
    Answer((50, 51), (-1.0, -2.0), True),
    Answer((60, 61, 62, 63), (-3.0, -4.0, -5.0, -6.0), False),
    Answer((70,), (-0.5,), True),
]


def trajectory() -> Trajectory:
    return make_trajectory([(5, 6, 7), (8, 9), (10, 11, 12, 13)], ANSWERS, [0, 1, 2])


def ids_of_targets(batch: Batch) -> torch.Tensor:
    return batch.targets().float()


class TestPlan:
    def test_each_epoch_takes_every_answer_once_in_an_order_of_its_own(self) -> None:
        plan = plan_updates(torch.arange(1, 12), micro_batch_size=2, batch_size=4, epochs=3)
        assert plan.num_updates == 9
        epochs = [[torch.cat(plan.of_update(3 * e + i, seed=5)) for i in range(3)] for e in range(3)]
        for epoch in epochs:
            assert sorted(torch.cat(epoch).tolist()) == list(range(11))
        assert len({tuple(torch.cat(epoch).tolist()) for epoch in epochs}) > 1

    def test_answers_that_share_a_pass_are_of_similar_length(self) -> None:
        lengths = torch.tensor([9, 2, 8, 1, 7, 3])
        plan = plan_updates(lengths, micro_batch_size=2, batch_size=2, epochs=1)
        assert [lengths[rows].tolist() for rows in plan.micro_batches] == [[9, 8], [7, 3], [2, 1]]

    def test_the_number_of_updates_does_not_depend_on_the_lengths(self) -> None:
        plans = [plan_updates(x, micro_batch_size=2, batch_size=4, epochs=2) for x in (torch.ones(7), torch.arange(7))]
        assert plans[0].num_updates == plans[1].num_updates == 4


def test_values_come_back_at_the_tokens_they_belong_to_whatever_the_passes() -> None:
    for passes in ([[0, 1, 2]], [[1], [0, 2]], [[2, 1], [0]]):
        found = at_responses(trajectory(), [torch.tensor(rows) for rows in passes], ids_of_targets)
        assert torch.equal(found, torch.where(trajectory().is_response, trajectory().ids.float(), 0.0))


def test_one_value_a_row_comes_back_at_its_row() -> None:
    rows = [torch.tensor([2, 0]), torch.tensor([1])]
    assert at_rows(trajectory(), rows, lambda batch: batch.input_ids[:, 0]).tolist() == [5.0, 8.0, 10.0]


def test_gradients_go_through_placing() -> None:
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    placed = place_responses(torch.tensor([[False, True, True], [True, False, False]]), values)
    assert placed.tolist() == [[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]
    (placed * torch.tensor([[9.0, 1.0, 2.0], [3.0, 9.0, 9.0]])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("with_critic", [True, False])
def test_experience_survives_as_named_tensors(with_critic: bool) -> None:
    like = trajectory().engine_logprobs
    critic = CriticTargets(like + 1, like + 2) if with_critic else None
    before = Experience(trajectory(), torch.arange(3.0), like + 3, like + 4, like + 5, critic)
    after = experience_from(before.tensors())
    assert (after.critic is None) == (critic is None)
    pairs = zip(before.tensors().items(), after.tensors().items(), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


def test_what_is_logged_by_hand() -> None:
    """Reference half as likely at each token: k3 of a log ratio of log 2 is 1/2 - 1 + log 2 a token."""
    path = trajectory()
    old = path.engine_logprobs + torch.where(path.is_response, 0.1, 0.0)
    reference = torch.where(path.is_response, old - torch.tensor(2.0).log(), 0.0)
    settings = PpoSettings(model=None, reward_model=None, out=None, data=())  # type: ignore[arg-type]
    values = describe(
        make_experience(
            path,
            scores=torch.tensor([1.0, 2.0, 6.0]),
            old_logprobs=old,
            reference_logprobs=reference,
            old_values=torch.zeros_like(old),
            kl_coefficient=0.1,
            settings=settings,
        )
    )
    k3 = 0.5 - 1.0 + 0.693147
    assert values["reward"] == pytest.approx(3.0)
    assert values["kl_per_token"] == pytest.approx(k3, abs=1e-5)
    assert values["kl_per_answer"] == pytest.approx(k3 * 7 / 3, abs=1e-5)
    assert values["entropy"] == pytest.approx(21.5 / 7 - 0.1, abs=1e-5)
    assert values["answer_tokens"] == pytest.approx(7 / 3)
    assert values["finished"] == pytest.approx(2 / 3)
    assert values["engine_mismatch"] == pytest.approx(0.1, abs=1e-6)


def test_the_missing_end_and_the_kl_reach_the_return() -> None:
    """With gamma and lambda 1 the return at the first token is the whole answer's reward."""
    path = trajectory()
    old = torch.where(path.is_response, -1.0, 0.0)
    reference = torch.where(path.is_response, -1.5, 0.0)
    settings = PpoSettings(model=None, reward_model=None, out=None, data=(), lam=1.0, missing_end_penalty=2.0)  # type: ignore[arg-type]
    found = make_experience(
        path,
        scores=torch.tensor([1.0, 1.0, 1.0]),
        old_logprobs=old,
        reference_logprobs=reference,
        old_values=torch.zeros_like(old),
        kl_coefficient=0.1,
        settings=settings,
    )
    assert found.critic is not None
    first = [found.critic.returns[0, 3], found.critic.returns[1, 2], found.critic.returns[2, 4]]
    assert [float(x) for x in first] == pytest.approx([1.0 - 0.1 * 0.5 * 2, 1.0 - 2.0 - 0.1 * 0.5 * 4, 1.0 - 0.05])
    assert found.advantages[path.is_response].mean().abs() < 1e-6
