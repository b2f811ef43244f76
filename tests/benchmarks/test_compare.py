from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.compare import changes_between, main, warnings
from benchmarks.peer_rows import Better, Row, to_json

pytestmark = pytest.mark.unit


def row(ours: list[float], what: str = "decode", better: Better = "more", theirs: float = 100.0) -> Row:
    return Row(what, "engine", "tokens/s", "llama.cpp", better, ours=ours, theirs=[theirs] * len(ours))


@pytest.mark.parametrize(
    ("before", "after", "better", "verdict"),
    [
        ([100, 110, 120], [130, 140, 150], "more", "better"),
        ([130, 140, 150], [100, 110, 120], "more", "worse"),
        ([100, 110, 120], [115, 140, 150], "more", "within noise"),
        ([130, 140, 150], [100, 110, 120], "less", "better"),
        ([100], [104], "more", "within noise"),
        ([100], [120], "more", "better"),
    ],
)
def test_only_what_lies_outside_both_runs_rounds_counts(
    before: list[float], after: list[float], better: Better, verdict: str
) -> None:
    (change,), unmatched = changes_between([row(before, better=better)], [row(after, better=better)])
    assert change.verdict == verdict
    assert unmatched == []


def test_a_faster_machine_is_no_change() -> None:
    (change,), _ = changes_between([row([100, 110])], [row([200, 220], theirs=200.0)])
    assert change.change == 1.0
    assert change.verdict == "within noise"


def test_rows_of_one_run_only_are_named_once() -> None:
    problem = Row("decode", "engine", "tokens/s", "llama.cpp", "more", problem="no compiler")
    changes, unmatched = changes_between([row([1.0]), row([1.0], "prefill")], [problem])
    assert changes == []
    assert sorted(one.what for one in unmatched) == ["decode", "prefill"]


def test_what_else_differs_is_said() -> None:
    before = {"machine": {"cpu": "a", "threads": 2}}
    after = {"machine": {"cpu": "b", "threads": 2}}
    assert warnings(before, after) == ["note: cpu differs: a and b"]


@pytest.mark.parametrize(("after", "status"), [([100.0, 101.0], 0), ([50.0, 51.0], 1)])
def test_exit_status_says_whether_something_got_worse(
    after: list[float], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, ours in zip(paths, ([100.0, 102.0], after), strict=True):
        path.write_text(json.dumps({"machine": {}, "rows": [to_json(row(ours))]}), encoding="utf-8")
    assert main([str(path) for path in paths]) == status
    assert "| decode | engine | llama.cpp | 1.01 |" in capsys.readouterr().out
