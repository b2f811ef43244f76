"""Which linears to refine for a perplexity budget: the order in which refining pays, and the search along that order.

Pure: sizes and harm in, refinements out; the search asks a callable for the perplexity of what it would try.
`quant.budget.search` measures, `quant.budget.attempts` calls it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from quant.errors import QuantizationError
from quant.options import LinearChoice
from quant.report.quantization_report import BudgetTrial

SCALE_BYTES = 2
INPUT_INDEX_BYTES = 4
# Trials along the order, and those of giving one refinement back. Each carries the held-out texts through the model.
MAX_TRIALS = 6
MAX_GIVEN_BACK = 2
# A mixture so near below the limit is good enough: a share of the limit, worth some thousandths of the file.
NEAR_SHARE = 0.01


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
    """One way to store a unit.

    walk: which of the walks made it
    harm: what it does to the model's predictions, in any unit that adds up over linears
    """

    choice: LinearChoice
    walk: int
    num_bytes: int
    harm: float


@dataclass(frozen=True, slots=True)
class Unit:
    """Linears that the engine multiplies as one, so that they are refined together.

    names: full names, such as `model.layers.0.mlp.gate_proj`
    rungs: from what the file has without refinement up to the best
    """

    names: tuple[str, ...]
    rungs: tuple[Rung, ...]


@dataclass(frozen=True, slots=True)
class Refinement:
    """`unit` goes from one rung up to `rung`. `gain` is the harm removed for each byte added."""

    unit: int
    rung: int
    gain: float


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The smallest mixture found that keeps the limit. `trials` in the order in which they were made."""

    refinements: tuple[Refinement, ...]
    increase_percent: float
    trials: tuple[BudgetTrial, ...]


def packed_bytes(out_features: int, in_features: int, bits: int, group_size: int) -> int:
    """Of one linear in the file: codes, a scale and a zero point for each group and row, and the inputs' groups."""
    groups = 1 if group_size == -1 else math.ceil(in_features / group_size)
    codes = out_features * in_features * bits // 8
    return codes + groups * out_features * (SCALE_BYTES * 8 + bits) // 8 + in_features * INPUT_INDEX_BYTES


def with_harm(units: Sequence[Unit], harm: Sequence[float]) -> list[Unit]:
    """The units with their harm measured anew. harm: of each unit's first rung; the others keep their ratio to it."""
    scaled: list[Unit] = []
    for unit, measured in zip(units, harm, strict=True):
        factor = measured / unit.rungs[0].harm if unit.rungs[0].harm > 0 else 0.0
        scaled.append(replace(unit, rungs=tuple(replace(rung, harm=rung.harm * factor) for rung in unit.rungs)))
    return scaled


def order_refinements(units: Sequence[Unit]) -> list[Refinement]:
    """All steps worth taking, the one first that removes most harm for each byte it adds.

    A step that pays less than the one after it is skipped with it: a unit climbs the lower hull of its rungs, so its
    steps come in the order of the rungs. Ties go to the earlier unit.
    """
    steps: list[Refinement] = []
    for index, unit in enumerate(units):
        at = 0
        while (step := _best_step(unit.rungs, at)) is not None:
            rung, gain = step
            steps.append(Refinement(index, rung, gain))
            at = rung
    return sorted(steps, key=lambda step: -step.gain)


def rungs_of(units: Sequence[Unit], refinements: Sequence[Refinement]) -> list[int]:
    """Which of its rungs each unit is on, with those refinements."""
    rungs = [0] * len(units)
    for step in refinements:
        rungs[step.unit] = max(step.rung, rungs[step.unit])
    return rungs


def num_refined(units: Sequence[Unit], refinements: Sequence[Refinement]) -> int:
    """The number of linears."""
    return sum(len(unit.names) for unit, rung in zip(units, rungs_of(units, refinements), strict=True) if rung > 0)


def weight_bytes(units: Sequence[Unit], refinements: Sequence[Refinement]) -> int:
    """Of all linears together, with those refinements."""
    rungs = rungs_of(units, refinements)
    return sum(unit.rungs[rung].num_bytes for unit, rung in zip(units, rungs, strict=True))


def total_harm(units: Sequence[Unit], refinements: Sequence[Refinement]) -> float:
    rungs = rungs_of(units, refinements)
    return sum(unit.rungs[rung].harm for unit, rung in zip(units, rungs, strict=True))


def search_budget(
    units: Sequence[Unit],
    order: Sequence[Refinement],
    limit_percent: float,
    base_percent: float,
    increase_of: Callable[[Sequence[Refinement]], float],
    least_percent: float = 0.0,
) -> SearchResult:
    """The shortest beginning of `order` whose perplexity keeps the limit, or nearly; then what of it is not needed.

    increase_of:   refinements -> increase of perplexity in percent; asked at most MAX_TRIALS + MAX_GIVEN_BACK times
    base_percent:  the increase without any refinement, which is too much
    least_percent: what is expected of taking them all; only the first guesses depend on it
    Raises BudgetUnreachableError if even all refinements are not enough.
    """
    search = _Search(units, limit_percent, increase_of, [BudgetTrial(0, weight_bytes(units, ()), base_percent)])
    bracket = _narrow(search, order, _Bracket(units, order, base_percent, least_percent))
    taken, increase = _give_back(search, list(order[: bracket.enough]), bracket)
    return SearchResult(tuple(taken), increase, tuple(search.trials))


@dataclass(frozen=True, slots=True)
class _Search:
    units: Sequence[Unit]
    limit: float
    increase_of: Callable[[Sequence[Refinement]], float]
    trials: list[BudgetTrial]

    def try_out(self, taken: Sequence[Refinement]) -> float:
        increase = self.increase_of(taken)
        self.trials.append(BudgetTrial(num_refined(self.units, taken), weight_bytes(self.units, taken), increase))
        return increase


class _Bracket:
    """`too_few` refinements of the order miss the limit; `enough` keep it, once `is_measured`.

    Between the two the increase is taken to fall evenly with the harm that is left.
    """

    def __init__(
        self, units: Sequence[Unit], order: Sequence[Refinement], base_percent: float, least_percent: float
    ) -> None:
        removed = accumulate((_harm_removed(units, order, place) for place in range(len(order))), initial=0.0)
        start = total_harm(units, ())
        self.harm_left = [start - gone for gone in removed]  # by the number of refinements
        self.too_few, self.enough = 0, len(order)
        self.is_measured = False
        self._base = self._over = base_percent
        self.within = least_percent
        self._same_side = 0

    def guess(self, limit: float) -> int:
        """How many refinements to try next."""
        share = (self._over - limit) / max(self._over - self.within, 1e-9)
        # A guess that falls on one side again and again creeps: half of the way is faster then.
        share = 0.5 if abs(self._same_side) >= 2 else share
        wanted = self.harm_left[self.too_few] - share * (self.harm_left[self.too_few] - self.harm_left[self.enough])
        count = next((count for count, left in enumerate(self.harm_left) if left <= wanted), self.enough)
        return min(max(count, self.too_few + 1), self.enough - 1 if self.is_measured else self.enough)

    def learn(self, count: int, increase: float, limit: float) -> None:
        if increase <= limit:
            self.enough, self.within, self.is_measured = count, increase, True
            self._same_side = max(self._same_side, 0) + 1
        else:
            self.too_few, self._over = count, increase
            self._same_side = min(self._same_side, 0) - 1

    @property
    def percent_of_harm(self) -> float:
        """What one more of harm adds to the increase: over all that was taken, since neighbours differ by chance."""
        removed = self.harm_left[0] - self.harm_left[self.enough]
        return (self._base - self.within) / removed if removed > 0 and self._base > self.within else math.inf


def _narrow(search: _Search, order: Sequence[Refinement], bracket: _Bracket) -> _Bracket:
    near = NEAR_SHARE * abs(search.limit)
    for trial in range(MAX_TRIALS):
        is_near = bracket.is_measured and search.limit - bracket.within <= near
        if is_near or (bracket.is_measured and bracket.enough - bracket.too_few <= 1):
            break
        # The last trial must not leave it open whether the limit can be kept at all.
        is_last = trial == MAX_TRIALS - 1 and not bracket.is_measured
        count = bracket.enough if is_last or not order else bracket.guess(search.limit)
        increase = search.try_out(order[:count])
        if count == len(order) and not increase <= search.limit:
            best = min(search.trials, key=lambda one: one.increase_percent)
            raise BudgetUnreachableError(search.limit, best.increase_percent, best.refined)
        bracket.learn(count, increase, search.limit)
    return bracket


def _give_back(search: _Search, taken: list[Refinement], bracket: _Bracket) -> tuple[list[Refinement], float]:
    """`taken` without those steps that turn out not to be needed, largest first, and its increase."""
    increase, refused = bracket.within, set[int]()
    for _ in range(MAX_GIVEN_BACK):
        room = (search.limit - increase) / bracket.percent_of_harm
        places = [
            place
            for place in range(len(taken))
            if place not in refused
            and _is_last_of_unit(taken, place)
            and _harm_removed(search.units, taken, place) <= room
        ]
        if not places:
            break
        place = max(places, key=lambda one: _bytes_added(search.units, taken, one))
        without = taken[:place] + taken[place + 1 :]
        tried = search.try_out(without)
        if tried <= search.limit:
            taken, increase, refused = without, tried, set[int]()
        else:
            refused.add(place)
    return taken, increase


def _is_last_of_unit(taken: Sequence[Refinement], place: int) -> bool:
    return all(later.unit != taken[place].unit for later in taken[place + 1 :])


def _before(taken: Sequence[Refinement], place: int) -> int:
    """The rung that the unit of step `place` was on before it."""
    return max((step.rung for step in taken[:place] if step.unit == taken[place].unit), default=0)


def _harm_removed(units: Sequence[Unit], taken: Sequence[Refinement], place: int) -> float:
    rungs = units[taken[place].unit].rungs
    return rungs[_before(taken, place)].harm - rungs[taken[place].rung].harm


def _bytes_added(units: Sequence[Unit], taken: Sequence[Refinement], place: int) -> int:
    rungs = units[taken[place].unit].rungs
    return rungs[taken[place].rung].num_bytes - rungs[_before(taken, place)].num_bytes


def _best_step(rungs: Sequence[Rung], at: int) -> tuple[int, float] | None:
    """The rung above `at` that pays best for its bytes, and how well; None where none removes harm."""
    start = rungs[at]
    paying = [
        (place, (start.harm - rung.harm) / max(rung.num_bytes - start.num_bytes, 1))
        for place, rung in enumerate(rungs)
        if place > at and rung.harm < start.harm
    ]
    return max(paying, key=lambda step: (step[1], step[0]), default=None)
