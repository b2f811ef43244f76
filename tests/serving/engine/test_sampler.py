"""Sampling against distributions worked out by hand, and its independence from the batch."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import msgspec
import pytest
import torch

from serving.engine import sampler
from serving.engine.requests import SamplingParams
from serving.engine.sampler import SamplingRow, sample, token_logprobs, uniform_draw

pytestmark = pytest.mark.unit

GREEDY = SamplingParams(max_tokens=1, temperature=0, seed=0)


def row(generated: tuple[int, ...] = (), prompt: tuple[int, ...] = (), **changes: float | None) -> SamplingRow:
    return SamplingRow(msgspec.structs.replace(GREEDY, **changes), 0, prompt, generated)


def draws(logits: list[float], count: int, **changes: float | int | None) -> Counter[int]:
    rows = [row((), (), **{"temperature": 1.0, **changes, "seed": seed}) for seed in range(count)]
    return Counter(sample(torch.tensor([logits] * count), rows))


def test_rows_drawn_together_get_what_each_gets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(1)) * 3
    rows = [row((1, 2), (), temperature=0.3 + i / 4, seed=i) for i in range(6)] + [row()]
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(7)]
    assert sample(logits, rows) == alone
    monkeypatch.setattr(sampler, "_SUMMED_AT_ONCE", 120)
    assert sample(logits, rows) == alone


def test_temperature_zero_takes_the_most_likely_token() -> None:
    assert sample(torch.tensor([[0.0, 3.0, 1.0]]), [row()]) == [1]


def test_draws_follow_the_softmax() -> None:
    found = draws([math.log(0.5), math.log(0.3), math.log(0.2)], 4000)
    for token, expected in enumerate((0.5, 0.3, 0.2)):
        assert found[token] / 4000 == pytest.approx(expected, abs=0.03)


def test_temperature_sharpens() -> None:
    found = draws([math.log(0.6), math.log(0.4)], 4000, temperature=0.5)
    assert found[0] / 4000 == pytest.approx(0.36 / (0.36 + 0.16), abs=0.03)


def test_top_k_keeps_k_tokens() -> None:
    assert set(draws([1.0, 0.9, 0.8, 0.7], 500, top_k=2)) == {0, 1}


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    assert set(draws(logits, 500, top_p=0.49)) == {0}
    assert set(draws(logits, 500, top_p=0.51)) == {0, 1}
    assert set(draws(logits, 1000, top_p=0.96)) == {0, 1, 2, 3}


def test_top_p_beyond_the_candidates_sorts_everything() -> None:
    flat = [0.0] * 1000
    found = draws(flat, 3000, top_p=0.9)
    assert 850 < len(found) <= 900


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.5]])
    assert sample(logits, [row(prompt=(0,), repetition_penalty=2.0)]) == [1]
    assert sample(torch.tensor([[-1.0, -1.5]]), [row(generated=(0,), repetition_penalty=2.0)]) == [1]


def test_frequency_counts_and_presence_does_not() -> None:
    logits = torch.tensor([[2.0, 1.0]])
    assert sample(logits, [row(generated=(0, 0, 0), frequency_penalty=0.5)]) == [1]
    assert sample(logits, [row(generated=(0, 0, 0), presence_penalty=0.5)]) == [0]
    assert sample(logits, [row(prompt=(0, 0, 0), frequency_penalty=2.0)]) == [0]


def test_penalties_leave_the_logits_of_the_caller_alone() -> None:
    logits = torch.tensor([[2.0, 1.0]])
    sample(logits, [row(generated=(0,), frequency_penalty=2.0)])
    assert logits.tolist() == [[2.0, 1.0]]


def test_the_same_request_draws_the_same_token_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 500, generator=generator)
    rows = [row(temperature=0.8, top_p=0.95, seed=seed, generated=tuple(range(seed))) for seed in range(8)]
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(8)]
    assert together == alone


def test_draws_differ_by_seed_choice_and_position() -> None:
    values = {uniform_draw(*key) for key in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))}
    assert len(values) == 4
    assert all(0 <= value < 1 for value in values)


def test_choices_of_one_request_are_not_copies() -> None:
    logits = torch.zeros(16, 1000)
    rows = [replace(row(temperature=1.0, seed=5), choice_index=i) for i in range(16)]
    assert len(set(sample(logits, rows))) > 10


def test_logprobs_are_of_the_models_own_distribution_and_sorted() -> None:
    logits = torch.tensor([[math.log(0.2), math.log(0.7), math.log(0.1)]])
    (found,) = token_logprobs(logits, [0], 2)
    assert found.logprob == pytest.approx(math.log(0.2), abs=1e-6)
    assert [token for token, _ in found.top] == [1, 0]
    assert found.top[0][1] == pytest.approx(math.log(0.7), abs=1e-6)


def test_each_position_draws_anew() -> None:
    rows = [row(temperature=1.0, seed=5, generated=tuple(range(i))) for i in range(16)]
    assert len(set(sample(torch.zeros(16, 1000), rows))) > 10
