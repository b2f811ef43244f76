from __future__ import annotations

import json
import math

import pytest

from training.errors import TrainingError
from training.kl_control import KlControl, make_controller, restore_controller, state_of

pytestmark = pytest.mark.unit

KINDS: tuple[KlControl, ...] = ("fixed", "adaptive", "lagrangian")


def test_fixed_coefficient_never_moves() -> None:
    controller = make_controller("fixed", coefficient=0.0, target=6.0, horizon=100)
    controller.update(100.0, 64)
    assert controller.coefficient == 0.0


def test_adaptive_coefficient_by_hand() -> None:
    controller = make_controller("adaptive", coefficient=0.1, target=6.0, horizon=1000)
    controller.update(6.6, 100)  # 10 % too far, a tenth of the horizon
    assert controller.coefficient == pytest.approx(0.1 * 1.01)
    controller.update(600.0, 100)  # the error is cut to 20 %
    assert controller.coefficient == pytest.approx(0.1 * 1.01 * 1.02)


def test_lagrangian_step_by_hand() -> None:
    controller = make_controller("lagrangian", coefficient=0.1, target=6.0, horizon=1)
    controller.update(9.0, 1)
    assert controller.coefficient == pytest.approx(0.1 * math.exp(0.05))


@pytest.mark.parametrize("kind", ["adaptive", "lagrangian"])
def test_controlled_divergence_settles_at_the_target(kind: KlControl) -> None:
    """A policy whose divergence is 1 / coefficient: the equilibrium is a coefficient of 1 / target."""
    controller = make_controller(kind, coefficient=0.01, target=4.0, horizon=500)
    for _ in range(400):
        controller.update(1.0 / controller.coefficient, 64)
    assert 1.0 / controller.coefficient == pytest.approx(4.0, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_state_goes_through_json_and_continues_exactly(kind: KlControl) -> None:
    first = make_controller(kind, coefficient=0.07, target=5.0, horizon=300)
    first.update(6.1, 64)
    second = make_controller(kind, coefficient=0.07, target=5.0, horizon=300)
    restore_controller(second, json.loads(json.dumps(state_of(first))))
    for controller in (first, second):
        controller.update(4.3, 64)
    assert first.coefficient == second.coefficient


def test_a_coefficient_of_0_cannot_adapt() -> None:
    with pytest.raises(TrainingError, match="can only be fixed"):
        make_controller("adaptive", coefficient=0.0, target=1.0, horizon=1)


def test_a_broken_state_is_refused() -> None:
    with pytest.raises(TrainingError, match="expected a number"):
        restore_controller(make_controller("fixed", coefficient=0.1, target=1.0, horizon=1), {"coefficient": "much"})
