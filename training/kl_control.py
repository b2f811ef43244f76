"""How hard the KL penalty pulls: a coefficient that is fixed, or moves towards a target divergence.

The divergence is the mean over answers of the KL to the reference summed over an answer's tokens, in nats. Controllers
hold two numbers, go into a checkpoint as JSON and come back with `restore_controller`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from quant.model_directory import JsonValue
from training.errors import TrainingError

KlControl: TypeAlias = Literal["fixed", "adaptive", "lagrangian"]
# Both bounds are far from any useful value: they keep a run that went wrong from ending in 0 or infinity.
_MIN_COEFFICIENT, _MAX_COEFFICIENT = 1e-6, 1e3
# Of the multiplier's logarithm an iteration: a tenth of the way that the relative error asks for.
LAGRANGIAN_RATE = 0.1
_MAX_RELATIVE_ERROR = 2.0


class KlController(Protocol):
    @property
    def coefficient(self) -> float: ...

    def update(self, kl: float, num_answers: int) -> None:
        """After an iteration. kl: measured nats an answer; num_answers: that it was measured on."""
        ...


@dataclass(slots=True)
class FixedKl:
    coefficient: float

    def update(self, kl: float, num_answers: int) -> None:
        """Nothing moves."""


@dataclass(slots=True)
class AdaptiveKl:
    """Proportional control. Source: arXiv:1909.08593, section 2.2: the relative error is cut to 0.2, and a horizon of
    answers later the coefficient has changed by up to that factor."""

    coefficient: float
    target: float
    horizon: int

    def update(self, kl: float, num_answers: int) -> None:
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coefficient = _bounded(self.coefficient * (1.0 + error * num_answers / self.horizon))


@dataclass(slots=True)
class LagrangianKl:
    """The coefficient is the multiplier of the constraint "KL is the target", raised by dual ascent.

    Ascent on its logarithm, as arXiv:1812.05905 (section 5) tunes a temperature: it stays positive, and the step is
    relative. Unlike proportional control it does not depend on how many answers an iteration has.
    """

    coefficient: float
    target: float

    def update(self, kl: float, num_answers: int) -> None:
        error = min(max(kl / self.target - 1.0, -1.0), _MAX_RELATIVE_ERROR)
        self.coefficient = _bounded(self.coefficient * math.exp(LAGRANGIAN_RATE * error))


def make_controller(kind: KlControl, *, coefficient: float, target: float, horizon: int) -> KlController:
    if kind != "fixed" and coefficient <= 0:
        raise TrainingError(f"a KL coefficient of {coefficient:g} can only be fixed; {kind} control multiplies it")
    if kind == "fixed":
        return FixedKl(coefficient)
    return AdaptiveKl(coefficient, target, horizon) if kind == "adaptive" else LagrangianKl(coefficient, target)


def state_of(controller: KlController) -> Mapping[str, JsonValue]:
    return {"coefficient": controller.coefficient}


def restore_controller(controller: KlController, state: Mapping[str, JsonValue]) -> None:
    """Go on where `state_of` was taken. The target and the rate come from the settings, as in a new run."""
    coefficient = state.get("coefficient")
    if not isinstance(coefficient, float | int) or isinstance(coefficient, bool):
        raise TrainingError(f"the checkpoint's KL coefficient is {coefficient!r}; expected a number")
    assert isinstance(controller, FixedKl | AdaptiveKl | LagrangianKl)
    controller.coefficient = float(coefficient)


def _bounded(coefficient: float) -> float:
    return min(max(coefficient, _MIN_COEFFICIENT), _MAX_COEFFICIENT)
