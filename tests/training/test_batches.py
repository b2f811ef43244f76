"""Packing and padding: what attends to what, what is predicted, and that padding changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.training.tiny_directory import CPU
from tests.training.tiny_llama import random_samples, tiny_llama
from training.batches import Batch, Sample, attention_mask, is_plain_causal, pack, pad_rows, plan_packing
from training.packed import batch_logprobs

pytestmark = pytest.mark.unit


def gradients(batch: Batch) -> tuple[Tensor, list[Tensor]]:
    model = tiny_llama()
    logprobs, log_z = batch_logprobs(model, CPU, batch)
    loss = -(logprobs.sum() + 0.1 * log_z.square().sum())
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def assert_equal_training(one: Batch, other: Batch) -> None:
    (loss, grads), (other_loss, other_grads) = gradients(one), gradients(other)
    torch.testing.assert_close(loss, other_loss, rtol=1e-5, atol=1e-5)
    for grad, other_grad in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(grad, other_grad, rtol=1e-4, atol=1e-5)


def test_pad_columns_change_neither_loss_nor_gradients() -> None:
    samples = random_samples(4)
    assert_equal_training(pad_rows(samples), pad_rows(samples, 31))


def test_packed_samples_train_as_if_alone() -> None:
    samples = random_samples(5)
    assert_equal_training(pad_rows(samples), pack([samples[:3], samples[3:]], 40))


def test_attention_stays_within_a_sample_and_looks_back_only() -> None:
    batch = pack([[Sample((5, 6), (False, True)), Sample((7, 8, 9), (False, True, True))]], 6)
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0],
            [0, 0, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 0],
            [0, 0, 0, 0, 0, 1],
        ]
    ).bool()
    assert torch.equal(attention_mask(batch)[0, 0], expected)
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 0]]
    assert not is_plain_causal(batch)


def test_the_first_id_of_a_sample_is_never_a_target() -> None:
    batch = pack([[Sample((5, 6), (True, True)), Sample((7, 8), (True, True))]])
    assert batch.targets().tolist() == [6, 8]
    assert batch.predictors().tolist() == [[True, False, True, False]]


def test_predictors_stand_right_before_their_targets() -> None:
    batch = pad_rows(random_samples(6))
    assert torch.equal(batch.predictors()[:, :-1], batch.is_target[:, 1:])
    assert batch.num_targets == sum(sample.num_targets for sample in random_samples(6))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_packing_places_every_sample_once_and_overfills_no_row(lengths: list[int]) -> None:
    rows = plan_packing(lengths, 20)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 20 for row in rows)
    # First fit leaves no two rows that could be one.
    sizes = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > 20


def test_a_sample_longer_than_a_row_is_the_callers_error() -> None:
    with pytest.raises(ValueError, match="sample 1 has 21 tokens; a row holds 20"):
        plan_packing([3, 21], 20)
    with pytest.raises(ValueError, match="2 ids and 1 marks"):
        Sample((1, 2), (True,))
