from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engine.step_cost import StepCost
from tests.serving.engine.tiny import SPEC

pytestmark = pytest.mark.unit


def test_attention_weighs_less_in_a_wider_model() -> None:
    wide = replace(SPEC, hidden_size=16 * SPEC.hidden_size, intermediate_size=16 * SPEC.intermediate_size)
    assert StepCost.of(wide).position_share < StepCost.of(SPEC).position_share / 15


@given(share=st.floats(0, 0.1), cost=st.floats(0, 1000), start=st.integers(0, 10_000))
def test_what_fits_is_within_the_cost_and_one_token_more_is_not(share: float, cost: float, start: int) -> None:
    step_cost = StepCost(share)
    count = step_cost.prompt_tokens_within(cost, start)
    assert count == 0 or step_cost.of_prompt(start, count) <= cost * (1 + 1e-9)
    assert step_cost.of_prompt(start, count + 1) > cost * (1 - 1e-9)


def test_streams_cost_more_the_more_they_are_and_the_longer() -> None:
    cost = StepCost(0.001)
    assert cost.of_streams([]) < cost.of_streams([10]) < cost.of_streams([10, 10]) < cost.of_streams([10, 500])
