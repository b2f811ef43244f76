"""Which linears to refine for a perplexity budget: the order in which refining pays, and the search over that order.

Pure: sizes and errors in, choices out; the search asks a callable for the perplexity of a set of choices.
`quant.budget_search` measures, `quant.quantize_directory` calls it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from quant.errors import QuantizationError
from quant.options import LinearChoice
from quant.report import BudgetTrial

SCALE_BYTES = 2
INPUT_INDEX_BYTES = 4


class BudgetUnreachableError(QuantizationError):
    """No mixture keeps the limit. `best_percent` is the least increase that was reached."""

    def __init__(self, limit_percent: float, best_percent: float, num_refined: int) -> None:
        super().__init__(
            f"perplexity cannot be kept within {limit_percent:g} %: the best that was reached is {best_percent:+.2f} % "
            f"with {num_refined} linears refined; nothing was written. Try --asym, --act-order, more --samples, "
            "calibration text that is nearer to the use, or a higher limit"
        )
        self.best_percent = best_percent
        self.num_refined = num_refined


@dataclass(frozen=True, slots=True)
class Rung:
    """One way to store a unit. `error`: of its linears' outputs over their squared norms, added up."""

    choice: LinearChoice
    num_bytes: int
    error: float


@dataclass(frozen=True, slots=True)
class Unit:
    """Linears that the engine multiplies as one, so that they are refined together.

    names: full names, such as `model.layers.0.mlp.gate_proj`
    kind:  what its sensitivity is looked up by
    rungs: from what the file has without refinement up to the best
    """

    names: tuple[str, ...]
    kind: str
    rungs: tuple[Rung, ...]


@dataclass(frozen=True, slots=True)
class Refinement:
    """`unit` goes from one rung up to `rung`. `gain` is error removed, times sensitivity, for each byte added."""

    unit: int
    rung: int
    gain: float


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The fewest refinements of the order that keep the limit. `trials` in the order in which they were made.

    measured: increase in percent by the number of refinements, with what was known before
    """

    num_refined: int
    trials: tuple[BudgetTrial, ...]
    measured: Mapping[int, float]

    @property
    def increase_percent(self) -> float:
        return self.measured[self.num_refined]


def packed_bytes(out_features: int, in_features: int, bits: int, group_size: int) -> int:
    """Of one linear in the file: codes, a scale and a zero point for each group and row, and the inputs' groups."""
    groups = 1 if group_size == -1 else math.ceil(in_features / group_size)
    codes = out_features * in_features * bits // 8
    return codes + groups * out_features * (SCALE_BYTES * 8 + bits) // 8 + in_features * INPUT_INDEX_BYTES


def order_refinements(units: Sequence[Unit], sensitivity: Mapping[str, float]) -> list[Refinement]:
    """All steps worth taking, the one first that removes most weighted error for each byte it adds.

    A step that pays less than the one after it is skipped with it: a unit climbs the lower hull of its rungs, so its
    steps come in the order of the rungs. sensitivity: by kind; 1 where absent. Ties go to the earlier unit.
    """
    steps: list[Refinement] = []
    for index, unit in enumerate(units):
        weight = sensitivity.get(unit.kind, 1.0)
        at = 0
        while (step := _best_step(unit.rungs, at)) is not None:
            rung, gain = step
            steps.append(Refinement(index, rung, gain * weight))
            at = rung
    return sorted(steps, key=lambda step: -step.gain)


def choices_of(units: Sequence[Unit], refinements: Sequence[Refinement]) -> dict[str, LinearChoice]:
    """Those of all linears that are refined: of each, the last of its unit's refinements."""
    rungs = _rungs_reached(refinements)
    return {name: units[index].rungs[rung].choice for index, rung in rungs.items() for name in units[index].names}


def weight_bytes(units: Sequence[Unit], refinements: Sequence[Refinement]) -> int:
    """Of all linears together, with those refinements."""
    rungs = _rungs_reached(refinements)
    return sum(unit.rungs[rungs.get(index, 0)].num_bytes for index, unit in enumerate(units))


def measured_sensitivity(
    units: Sequence[Unit], base_increase: float, increase_without: Mapping[str, float]
) -> dict[str, float]:
    """Perplexity per unit of error for each kind: what refining all of the kind gained, over the error it removed.

    increase_without: by kind, the increase in percent with every unit of that kind at its best rung. A kind that
    gained nothing measurable counts a hundredth of the most sensitive one, so that it comes last and not never.
    """
    removed: dict[str, float] = {}
    for unit in units:
        removed[unit.kind] = removed.get(unit.kind, 0.0) + unit.rungs[0].error - unit.rungs[-1].error
    gained = {
        kind: (base_increase - increase) / removed[kind]
        for kind, increase in increase_without.items()
        if removed.get(kind, 0.0) > 0
    }
    least = max([0.0, *gained.values()]) / 100
    return {kind: max(value, least) for kind, value in gained.items()} if least > 0 else {}


def search_budget(
    units: Sequence[Unit],
    order: Sequence[Refinement],
    limit_percent: float,
    try_choices: Callable[[Mapping[str, LinearChoice]], float],
    known: Mapping[int, float] | None = None,
) -> SearchResult:
    """Bisect for the shortest beginning of `order` whose perplexity keeps the limit; each is measured once.

    try_choices: choices of the refined linears -> increase of perplexity in percent
    known:       increases measured already, by the number of refinements
    Raises BudgetUnreachableError if even all refinements are not enough.
    """
    measured = dict(known or {})
    trials: list[BudgetTrial] = []

    def increase_of(count: int) -> float:
        taken = order[:count]
        if count not in measured:
            measured[count] = try_choices(choices_of(units, taken))
        refined = len(choices_of(units, taken))
        trials.append(BudgetTrial(refined, weight_bytes(units, taken), measured[count]))
        return measured[count]

    if increase_of(0) <= limit_percent:
        return SearchResult(0, tuple(trials), measured)
    if not order or increase_of(len(order)) > limit_percent:
        best = min(trials, key=lambda trial: trial.increase_percent)
        raise BudgetUnreachableError(limit_percent, best.increase_percent, best.refined)
    too_few, enough = 0, len(order)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if increase_of(middle) <= limit_percent:
            enough = middle
        else:
            too_few = middle
    return SearchResult(enough, tuple(trials), measured)


def _best_step(rungs: Sequence[Rung], at: int) -> tuple[int, float] | None:
    """The rung above `at` that pays best for its bytes, and how well; None where none removes error."""
    start = rungs[at]
    paying = [
        (place, (start.error - rung.error) / max(rung.num_bytes - start.num_bytes, 1))
        for place, rung in enumerate(rungs)
        if place > at and rung.error < start.error
    ]
    return max(paying, key=lambda step: (step[1], step[0]), default=None)


def _rungs_reached(refinements: Sequence[Refinement]) -> dict[int, int]:
    reached: dict[int, int] = {}
    for step in refinements:
        reached[step.unit] = max(step.rung, reached.get(step.unit, 0))
    return reached
