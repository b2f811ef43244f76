"""Two runs of `benchmarks.peers` by their ratios to a peer, never by absolute times: machines differ, and drift.

    python -m benchmarks.compare before.json after.json

A change is real where the rounds' ratios of both runs do not overlap; the rest is noise. Exit status 1 if something
got worse beyond the noise, so that a script can stop.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.peer_rows import Row, from_json

Verdict = Literal["better", "worse", "within noise"]


@dataclass(frozen=True, slots=True)
class Change:
    """One row in both runs. `change` is the later ratio over the earlier, 1 for none."""

    before: Row
    after: Row
    change: float
    verdict: Verdict


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    options = parser.parse_args(argv)
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in (options.before, options.after)]
    before, after = ([from_json(record) for record in run["rows"]] for run in runs)
    changes, unmatched = changes_between(before, after)
    print("\n".join([*warnings(*runs), changes_table(changes)]))
    for row in unmatched:
        print(f"- only in one run, or not measured in one: {row.what}, {row.where}, beside {row.peer}")
    return 1 if any(change.verdict == "worse" for change in changes) else 0


def changes_between(before: Sequence[Row], after: Sequence[Row]) -> tuple[list[Change], list[Row]]:
    """What both runs measured, and the rows that only one did."""
    later = {row.key: row for row in after}
    changes: list[Change] = []
    for row in before:
        other = later.get(row.key)
        if other is None or row.ratio is None or other.ratio is None:
            continue
        changes.append(Change(row, other, other.ratio / row.ratio, _verdict(row, other)))
    matched = {change.before.key for change in changes}
    unmatched = {row.key: row for row in (*before, *after) if row.key not in matched}
    return changes, list(unmatched.values())


def _verdict(before: Row, after: Row) -> Verdict:
    """By the ranges of the rounds' ratios; a single round has no range, so 5 % stand for one."""
    low_before, high_before = _range(before)
    low_after, high_after = _range(after)
    if low_after <= high_before and low_before <= high_after:
        return "within noise"
    rose = low_after > high_before
    return "better" if rose == (before.better == "more") else "worse"


def _range(row: Row) -> tuple[float, float]:
    ratios = [mine / other for mine, other in zip(row.ours, row.theirs, strict=True)]
    slack = 0.05 if len(ratios) == 1 else 0.0
    return min(ratios) * (1 - slack), max(ratios) * (1 + slack)


def changes_table(changes: Sequence[Change]) -> str:
    lines = [
        "| what | where | beside | before | after | change | |",
        "|---|---|---|--:|--:|--:|---|",
    ]
    for item in changes:
        ratios = f"{item.before.ratio:.2f} | {item.after.ratio:.2f} | {item.change:.2f}"
        lines.append(f"| {' | '.join(item.before.key)} | {ratios} | {item.verdict} |")
    return "\n".join(lines)


def warnings(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs between the runs other than our code: ratios hold across machines only roughly."""
    names = ("cpu", "threads", "isa", "peers", "quick")
    return [
        f"note: {name} differs: {before['machine'].get(name)} and {after['machine'].get(name)}"
        for name in names
        if before["machine"].get(name) != after["machine"].get(name)
    ]


if __name__ == "__main__":
    raise SystemExit(main())
