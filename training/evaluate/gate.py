"""Rules that a new model must keep to replace the old one, and the verdict on each.

A rules file is TOML, one measure a line:

    perplexity_increase_percent = {max = 3}
    win_rate_lower = {min = 0.5}

A name is a measure of the report, or one with `_lower` or `_upper` (an end of its 95 % interval) or `_change` (new
minus old). A rule that cannot be decided is an error, never a pass.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from training.errors import TrainingError
from training.evaluate.catalogue import CATALOGUE
from training.evaluate.intervals import Measure

__all__ = ["GateFailed", "Rule", "Ruling", "apply_rules", "check_rules", "gate_table", "read_rules"]

_ENDS = ("lower", "upper", "change")


class GateFailed(TrainingError):
    """The report is written; the new model may not replace the old one."""


@dataclass(frozen=True, slots=True)
class Rule:
    """minimum and maximum are inclusive; at least one is given."""

    name: str
    minimum: float | None
    maximum: float | None

    def __str__(self) -> str:
        low = [] if self.minimum is None else [f"at least {self.minimum:g}"]
        high = [] if self.maximum is None else [f"at most {self.maximum:g}"]
        return " and ".join(low + high)


@dataclass(frozen=True, slots=True)
class Ruling:
    rule: Rule
    value: float

    @property
    def is_kept(self) -> bool:
        """A value that is no number keeps no rule."""
        above = self.rule.minimum is None or self.value >= self.rule.minimum
        below = self.rule.maximum is None or self.value <= self.rule.maximum
        return not math.isnan(self.value) and above and below


def read_rules(path: Path) -> tuple[Rule, ...]:
    """Raises TrainingError for a file that cannot be read, an unknown measure, or a rule without a bound."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(f"gate rules {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TrainingError(f"gate rules {path} are not valid TOML: {error}") from error
    if not table:
        raise TrainingError(f"gate rules {path} hold no rule; expected lines such as win_rate_lower = {{min = 0.5}}")
    return tuple(_rule(path, name, value) for name, value in table.items())


def check_rules(rules: Sequence[Rule], computed: Collection[str], has_old_model: bool) -> None:
    """Raises TrainingError for a rule on something that this run will not compute: better now than after hours."""
    for rule in rules:
        name, end = _split(rule.name)
        if name not in computed:
            info = CATALOGUE[name]
            needs = " ".join("--" + need.replace("_", "-") for need in info.needs)
            raise TrainingError(
                f"gate rule {rule.name!r} is on a measure that this run does not compute; it needs "
                f"--measures {info.group}" + (f" and {needs}" if needs else "")
            )
        if end == "change" and (CATALOGUE[name].is_pairwise or not has_old_model):
            why = "compares the models already" if CATALOGUE[name].is_pairwise else "needs --against"
            raise TrainingError(f"gate rule {rule.name!r}: {name!r} {why}")


def apply_rules(rules: Sequence[Rule], new: Mapping[str, Measure], old: Mapping[str, Measure]) -> tuple[Ruling, ...]:
    """Raises TrainingError for a rule on a measure that was not computed."""
    return tuple(Ruling(rule, _value(rule, new, old)) for rule in rules)


def gate_table(rulings: Sequence[Ruling]) -> str:
    """For a terminal: one line a rule."""
    width = max(len(ruling.rule.name) for ruling in rulings)
    lines = [
        f"{'kept  ' if ruling.is_kept else 'FAILED'}  {ruling.rule.name:<{width}}  {ruling.value:>10.4g}  {ruling.rule}"
        for ruling in rulings
    ]
    return "\n".join(lines)


def _rule(path: Path, name: str, value: object) -> Rule:
    _split(name)
    if not isinstance(value, dict) or not value:
        raise TrainingError(
            f"gate rule {name!r} in {path.name} is {value!r}; expected {{min = X}}, {{max = X}} or both"
        )
    bounds = cast("dict[str, object]", value)
    unknown = [key for key in bounds if key not in ("min", "max")]
    if unknown:
        raise TrainingError(f"gate rule {name!r} in {path.name} has {unknown[0]!r}; expected min or max")
    for key, bound in bounds.items():
        if isinstance(bound, bool) or not isinstance(bound, int | float) or math.isnan(bound):
            raise TrainingError(f"gate rule {name!r} in {path.name}: {key} is {bound!r}; expected a number")
    low, high = (cast("float | None", bounds.get(key)) for key in ("min", "max"))
    if low is not None and high is not None and low > high:
        raise TrainingError(f"gate rule {name!r} in {path.name} can never be kept: min {low:g} is above max {high:g}")
    return Rule(name, low, high)


def _split(name: str) -> tuple[str, str | None]:
    """(measure, lower, upper, change or None). Raises TrainingError with the nearest name."""
    if name in CATALOGUE:
        return name, None
    base, _, end = name.rpartition("_")
    if base in CATALOGUE and end in _ENDS:
        return base, end
    names = [*CATALOGUE, *(f"{measure}_{end}" for measure in CATALOGUE for end in _ENDS)]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(CATALOGUE)}"
    raise TrainingError(f"gate rule {name!r} names no measure; {hint}")


def _value(rule: Rule, new: Mapping[str, Measure], old: Mapping[str, Measure]) -> float:
    name, end = _split(rule.name)
    found: float | None = None
    if name in new:
        measure = new[name]
        match end:
            case "lower":
                found = measure.low
            case "upper":
                found = measure.high
            case "change":
                found = measure.value - old[name].value if name in old else None
            case _:
                found = measure.value
    if found is None:
        raise TrainingError(f"gate rule {rule.name!r} cannot be decided: the run did not compute it")
    return found
