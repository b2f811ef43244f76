"""The pairwise loss over whole rankings: worked out by hand, equal to TRL's, and what it must not depend on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from training.batches import Sample, pack, pad_rows
from training.reward_loss import pairs_of, pairwise_logistic_loss
from training.reward_model import RewardHead
from training.trunk import final_hidden, target_logprobs

pytestmark = pytest.mark.unit

TRL = Path(__file__).resolve().parents[1] / "data" / "training" / "trl_losses"
# Written by tests/data/training/make_trl_losses.py in TRL's own environment.
TOLERANCE = 1e-5


def minus_log_sigmoid(margin: float) -> float:
    return math.log1p(math.exp(-margin))


def test_three_answers_give_three_pairs_of_a_third_each() -> None:
    scores = torch.tensor([2.0, 0.5, -1.0])
    by_hand = (minus_log_sigmoid(1.5) + minus_log_sigmoid(3.0) + minus_log_sigmoid(1.5)) / 3
    assert float(pairwise_logistic_loss(scores, pairs_of([[1, 2, 3]]))) == pytest.approx(by_hand, rel=1e-6)


def test_a_tie_is_no_comparison_and_leaves_the_other_pairs_weights() -> None:
    pairs = pairs_of([[1, 2, 2]])
    assert list(zip(pairs.better.tolist(), pairs.worse.tolist(), strict=True)) == [(0, 1), (0, 2)]
    assert pairs.weight.tolist() == pytest.approx([1 / 3, 1 / 3])


def test_rankings_with_nothing_but_ties_cost_nothing() -> None:
    assert float(pairwise_logistic_loss(torch.tensor([1.0, 2.0]), pairs_of([[1, 1]]))) == 0.0


def test_pairs_never_cross_rankings() -> None:
    pairs = pairs_of([[1, 2], [3, 1, 2]])
    assert pairs.better.tolist() == [0, 3, 4, 3]
    assert pairs.worse.tolist() == [1, 2, 2, 4]


def test_rankings_weigh_the_same_however_many_answers_they_have() -> None:
    assert float(pairs_of([[1, 2]]).weight.sum()) == pytest.approx(1.0)
    assert float(pairs_of([[1, 2, 3, 4, 5, 6, 7, 8, 9]]).weight.sum()) == pytest.approx(1.0)


def test_equal_scores_start_at_the_log_of_two() -> None:
    pairs = pairs_of([[1, 2, 3, 4], [1, 2]])
    assert float(pairwise_logistic_loss(torch.zeros(6), pairs) / pairs.weight.sum()) == pytest.approx(math.log(2))


def test_order_of_the_answers_in_a_ranking_changes_nothing() -> None:
    scores, ranks = torch.tensor([0.3, -1.0, 2.0]), [2, 3, 1]
    turned = [2, 0, 1]
    loss = pairwise_logistic_loss(scores, pairs_of([ranks]))
    other = pairwise_logistic_loss(scores[turned], pairs_of([[ranks[place] for place in turned]]))
    assert float(loss) == pytest.approx(float(other), rel=1e-6)


@pytest.fixture(scope="module")
def trl() -> dict[str, Any]:
    return json.loads((TRL / "losses.json").read_text())


@pytest.fixture(scope="module")
def trl_model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(str(TRL)).eval()


@torch.no_grad()
def test_reward_loss_is_trls_on_the_same_weights_and_rows(trl: dict[str, Any], trl_model: LlamaForCausalLM) -> None:
    pairs = trl["reward"]["pairs"]
    rows = [tuple(pair[name]) for pair in pairs for name in ("chosen", "rejected")]
    batch = pad_rows([Sample(row, (False,) * len(row)) for row in rows])
    head = RewardHead(load_file(TRL / "reward_head.safetensors")["weight"])
    last = torch.tensor([len(row) - 1 for row in rows])
    scores = head(final_hidden(trl_model, batch)[torch.arange(len(rows)), last])
    compared = pairs_of([[1, 2]] * len(pairs))
    loss = pairwise_logistic_loss(scores, compared) / compared.weight.sum()
    assert float(loss) == pytest.approx(trl["reward"]["loss"], abs=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("is_packed", [False, True], ids=["one sample to a row", "packed"])
def test_sft_loss_is_trls_on_the_same_weights_and_rows(
    trl: dict[str, Any], trl_model: LlamaForCausalLM, is_packed: bool
) -> None:
    samples = [
        Sample(tuple(row["input_ids"]), tuple(label != -100 for label in row["labels"])) for row in trl["sft"]["rows"]
    ]
    batch = pack([samples[:3], samples[3:]]) if is_packed else pad_rows(samples)
    hidden = final_hidden(trl_model, batch)
    logprobs, _ = target_logprobs(trl_model, hidden[batch.predictors()], batch.targets())
    assert -float(logprobs.sum()) / batch.num_targets == pytest.approx(trl["sft"]["loss"], abs=TOLERANCE)
