"""What a comparison with peers measures, and what it found: pure records, statistics, table and JSON.

Used by `peers.py`, which measures, and `compare.py`, which reads two runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal

BEST_OF_PEERS = "the best peer"
Better = Literal["more", "less"]


@dataclass(frozen=True, slots=True)
class Measure:
    """One thing measured on several sides. `sides` name a measurement each, called with the round's number."""

    what: str
    where: str  # engine, HTTP or memory
    unit: str
    ours: Callable[[int], float]
    peers: Mapping[str, Callable[[int], float]]
    goal: float | None = None
    goal_beside: str | None = None  # a peer's name or BEST_OF_PEERS
    better: Better = "more"
    missing: Mapping[str, str] = field(default_factory=dict[str, str])  # a peer and why it cannot be measured


@dataclass(frozen=True, slots=True)
class Row:
    """One measure beside one peer, a figure a round. With a `problem` there are none."""

    what: str
    where: str
    unit: str
    peer: str
    better: Better
    goal: float | None = None
    ours: Sequence[float] = ()
    theirs: Sequence[float] = ()
    problem: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.what, self.where, self.peer

    @property
    def ratio(self) -> float | None:
        """Ours over theirs: the median of the rounds' ratios, so that a drifting machine cancels out."""
        if not self.ours or self.problem is not None:
            return None
        return median(mine / other for mine, other in zip(self.ours, self.theirs, strict=True))

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is; None without one, and False for a goal that could not be measured."""
        if self.goal is None:
            return None
        if self.ratio is None:
            return False
        return self.ratio >= self.goal if self.better == "more" else self.ratio <= self.goal


def rows_of(measure: Measure, found: Mapping[str, Sequence[float]], problems: Mapping[str, str]) -> list[Row]:
    """One row a peer. `found` has the rounds of "ours" and of each peer, `problems` why some have none."""
    rows: list[Row] = []
    for peer in (*measure.peers, *measure.missing):
        problem = measure.missing.get(peer) or problems.get(peer)
        if "ours" in problems:
            problem = f"ours: {problems['ours']}"
        row = Row(measure.what, measure.where, measure.unit, peer, measure.better, problem=problem)
        rows.append(row if problem else replace(row, ours=found["ours"], theirs=found[peer]))
    return [replace(row, goal=measure.goal) if row.peer == _beside(measure, rows) else row for row in rows]


def _beside(measure: Measure, rows: Iterable[Row]) -> str | None:
    """The peer that the goal is set against. Of the best: the fastest in the median of those that were measured."""
    if measure.goal_beside != BEST_OF_PEERS:
        return measure.goal_beside
    rows = list(rows)
    measured = [row for row in rows if row.ratio is not None]
    if not measured:
        return rows[0].peer if rows else None
    choose = max if measure.better == "more" else min
    return choose(measured, key=lambda row: median(row.theirs)).peer


def in_turns(
    sides: Mapping[str, Callable[[int], float]], num_rounds: int, *, failures: tuple[type[Exception], ...]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Every side once a round, in turning order (A B, B A, …), after a round 0 that warms up and is thrown away.

    A side that raises one of `failures` is left out from then on, and its message returned in the second mapping.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    problems: dict[str, str] = {}
    for index in range(num_rounds + 1):
        names = list(sides)
        for name in names if index % 2 else reversed(names):
            if name in problems:
                continue
            try:
                value = sides[name](index)
            except failures as error:
                problems[name] = " ".join(str(error).split())[-300:]
                continue
            if index:
                found[name].append(value)
    return {name: values for name, values in found.items() if name not in problems}, problems


def table(rows: Sequence[Row]) -> str:
    """Markdown, as in docs/benchmarks.md: medians of each side, the ratio, and the goal where one is set."""
    lines = [
        "| what | where | beside | ours | theirs | ratio | goal |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    notes: list[str] = []
    for row in rows:
        goal = "" if row.goal is None else f"{'≥' if row.better == 'more' else '≤'} {row.goal:g}"
        if row.ratio is None:
            shown = ["", "", "not measured"]
            notes.append(f"{row.what}, {row.where}, beside {row.peer}: {row.problem}")
        else:
            missed = row.is_met is False
            ratio = f"**{row.ratio:.2f}**" if missed else f"{row.ratio:.2f}"
            shown = [f"{_figure(median(side))} {row.unit}" for side in (row.ours, row.theirs)] + [ratio]
        lines.append(f"| {' | '.join([row.what, row.where, row.peer, *shown, goal])} |")
    return "\n".join([*lines, *([""] if notes else []), *(f"- not measured: {note}" for note in notes)])


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def to_json(row: Row) -> dict[str, Any]:
    """Everything of a row, with the derived figures for whoever reads the file without this module."""
    names = ("what", "where", "unit", "peer", "better", "goal", "problem", "ratio", "is_met")
    return {**{name: getattr(row, name) for name in names}, "ours": list(row.ours), "theirs": list(row.theirs)}


def from_json(record: Mapping[str, Any]) -> Row:
    """The row that `to_json` wrote. Raises KeyError for a record of something else."""
    better = record["better"]
    if better not in ("more", "less"):
        raise KeyError(f"better is {better!r}, neither 'more' nor 'less'")
    return Row(
        what=record["what"],
        where=record["where"],
        unit=record["unit"],
        peer=record["peer"],
        better=better,
        goal=record["goal"],
        ours=tuple(record["ours"]),
        theirs=tuple(record["theirs"]),
        problem=record["problem"],
    )
