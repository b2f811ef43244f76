"""The order of refinements and the search over it, on made-up units whose perplexity is a sum."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.budget import (
    Rung,
    Unit,
    choices_of,
    measured_sensitivity,
    order_refinements,
    packed_bytes,
    search_budget,
    weight_bytes,
)
from quant.errors import QuantizationError
from quant.options import LinearChoice

pytestmark = pytest.mark.unit

FOUR, SMALL, EIGHT = LinearChoice(4, 128), LinearChoice(4, 32), LinearChoice(8, 128)


def unit(name: str, *errors: float, kind: str = "mlp", sizes: tuple[int, ...] = (100, 110, 200)) -> Unit:
    choices = (FOUR, SMALL, EIGHT) if len(errors) == 3 else (FOUR, EIGHT)
    bytes_of = sizes if len(errors) == 3 else (sizes[0], sizes[-1])
    rungs = tuple(Rung(*parts) for parts in zip(choices, bytes_of, errors, strict=True))
    return Unit((name,), kind, rungs)


class SummedErrors:
    """A model whose perplexity rises by the errors of its units, in percent. Counts how often it is asked."""

    def __init__(self, *units: Unit) -> None:
        self._units = units
        self.asked: list[int] = []

    def __call__(self, choices: Mapping[str, LinearChoice]) -> float:
        self.asked.append(len(choices))
        total = 0.0
        for one in self._units:
            choice = choices.get(one.names[0], FOUR)
            total += next(rung.error for rung in one.rungs if rung.choice == choice)
        return total


def test_the_worst_error_for_its_bytes_comes_first() -> None:
    units = [unit("a", 1.0, 0.0), unit("b", 5.0, 0.0), unit("c", 3.0, 0.0)]
    assert [step.unit for step in order_refinements(units, {})] == [1, 2, 0]


def test_sensitivity_weighs_the_error() -> None:
    units = [unit("a", 1.0, 0.0, kind="attention"), unit("b", 5.0, 0.0)]
    assert [step.unit for step in order_refinements(units, {"attention": 10.0})] == [0, 1]


def test_a_cheap_smaller_group_comes_before_eight_bits_and_a_poor_one_is_skipped() -> None:
    units = [unit("cheap", 1.0, 0.8, 0.0), unit("poor", 1.0, 0.99, 0.0)]
    order = order_refinements(units, {})
    assert [(step.unit, step.rung) for step in order] == [(0, 1), (1, 2), (0, 2)]
    assert choices_of(units, order[:2]) == {"cheap": SMALL, "poor": EIGHT}
    assert choices_of(units, order) == {"cheap": EIGHT, "poor": EIGHT}
    assert [weight_bytes(units, order[:count]) for count in range(4)] == [200, 210, 310, 400]


def test_what_removes_no_error_is_not_in_the_order() -> None:
    assert order_refinements([unit("a", 1.0, 1.0)], {}) == []


def test_linears_of_one_product_are_refined_together() -> None:
    fused = Unit(("q", "k"), "attention", (Rung(FOUR, 10, 1.0), Rung(EIGHT, 20, 0.0)))
    assert choices_of([fused], order_refinements([fused], {})) == {"q": EIGHT, "k": EIGHT}


@settings(max_examples=60, deadline=None)
@given(
    errors=st.lists(st.floats(0.01, 10), min_size=1, max_size=12),
    share=st.floats(0.01, 0.99),
)
def test_the_fewest_refinements_that_keep_the_limit_are_found_with_few_trials(
    errors: list[float], share: float
) -> None:
    units = [unit(f"u{place}", error, 0.0) for place, error in enumerate(errors)]
    order, model = order_refinements(units, {}), SummedErrors(*units)
    limit = sum(errors) * share
    found = search_budget(units, order, limit, model)
    assert model(choices_of(units, order[: found.num_refined])) <= limit
    assert model(choices_of(units, order[: found.num_refined - 1])) > limit
    assert len(found.trials) <= 2 + len(order).bit_length()


def test_a_budget_that_holds_already_needs_one_trial() -> None:
    units = [unit("a", 1.0, 0.0)]
    model = SummedErrors(*units)
    found = search_budget(units, order_refinements(units, {}), 1.0, model)
    assert (found.num_refined, model.asked) == (0, [0])


def test_what_was_measured_before_is_not_measured_again() -> None:
    units = [unit("a", 2.0, 0.0), unit("b", 1.0, 0.0)]
    model = SummedErrors(*units)
    found = search_budget(units, order_refinements(units, {}), 1.5, model, known={0: 3.0, 2: 0.0})
    assert (found.num_refined, model.asked) == (1, [1])
    assert [trial.increase_percent for trial in found.trials] == [3.0, 0.0, 1.0]


def test_a_budget_that_cannot_be_met_is_an_error_with_the_best_figure() -> None:
    units = [unit("a", 2.0, 0.5), unit("b", 1.0, 0.25)]
    with pytest.raises(
        QuantizationError, match=r"within 0\.5 %: the best that was reached is \+0\.75 % with 2 linears"
    ):
        search_budget(units, order_refinements(units, {}), 0.5, SummedErrors(*units))


def test_sensitivity_is_what_refining_a_kind_gained_over_the_error_it_removed() -> None:
    units = [unit("a", 2.0, 0.0, kind="attention"), unit("b", 3.0, 1.0), unit("c", 2.0, 0.0)]
    found = measured_sensitivity(units, 10.0, {"attention": 4.0, "mlp": 10.5})
    assert found == {"attention": 3.0, "mlp": 0.03}
    assert measured_sensitivity(units, 10.0, {"attention": 11.0}) == {}


def test_bytes_are_those_of_the_packed_tensors() -> None:
    # 64 x 128 at 4 bits: 4096 of codes, 4 groups x 64 rows of scales (2 bytes) and zeros (half a byte), g_idx.
    assert packed_bytes(64, 128, 4, 32) == 4096 + 4 * 64 * 2 + 4 * 64 // 2 + 128 * 4
    assert packed_bytes(64, 128, 8, -1) == 8192 + 64 * 3 + 512
