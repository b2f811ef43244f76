from __future__ import annotations

import json

import pytest

from benchmarks.peer_rows import BEST_OF_PEERS, Better, Measure, Row, from_json, in_turns, rows_of, table, to_json

pytestmark = pytest.mark.unit


def row(ours: list[float], theirs: list[float], goal: float | None = None, better: Better = "more") -> Row:
    return Row("decode", "engine", "tokens/s", "llama.cpp", better, goal=goal, ours=ours, theirs=theirs)


def one(index: int) -> float:
    return 1.0


def measure(better: Better = "more", goal_beside: str = "vLLM", missing: dict[str, str] | None = None) -> Measure:
    peers = {name: one for name in ("llama.cpp", "vLLM") if name not in (missing or {})}
    return Measure(
        "x", "HTTP", "ms", one, peers, goal=0.7, goal_beside=goal_beside, better=better, missing=missing or {}
    )


def test_ratio_is_the_median_of_the_rounds_ratios_not_the_ratio_of_medians() -> None:
    drifting = row(ours=[10.0, 20.0, 90.0], theirs=[5.0, 40.0, 30.0])
    assert drifting.ratio == 2.0  # of 2, 0.5 and 3; the medians would give 20 / 30


@pytest.mark.parametrize(
    ("better", "ours", "is_met"), [("more", 2.0, True), ("more", 1.9, False), ("less", 2.0, True), ("less", 2.1, False)]
)
def test_goal_is_met_on_its_own_side(better: Better, ours: float, is_met: bool) -> None:
    assert row([ours], [1.0], goal=2.0, better=better).is_met is is_met


def test_goal_that_was_not_measured_is_not_met() -> None:
    assert Row("x", "HTTP", "ms", "vLLM", "less", goal=0.7, problem="no package").is_met is False
    assert row([1.0], [1.0]).is_met is None


def test_sides_change_places_every_round_and_the_first_round_is_thrown_away() -> None:
    calls: list[str] = []

    def side(name: str, value: float):  # noqa: ANN202
        def call(index: int) -> float:
            calls.append(f"{name}{index}")
            return value + index

        return call

    found, problems = in_turns({"a": side("a", 10), "b": side("b", 20)}, 2, failures=(RuntimeError,))
    assert calls == ["b0", "a0", "a1", "b1", "b2", "a2"]
    assert found == {"a": [11, 12], "b": [21, 22]}
    assert problems == {}


def test_a_side_that_breaks_is_left_out_and_the_others_go_on() -> None:
    def breaks(index: int) -> float:
        if index == 2:
            raise RuntimeError("the  server\nwent away")
        return 1.0

    found, problems = in_turns({"ours": lambda _: 3.0, "vLLM": breaks}, 3, failures=(RuntimeError,))
    assert found == {"ours": [3.0, 3.0, 3.0]}
    assert problems == {"vLLM": "the server went away"}


def test_a_mistake_of_our_own_is_not_taken_for_a_side_that_breaks() -> None:
    with pytest.raises(ZeroDivisionError):
        in_turns({"ours": lambda _: 1 / 0}, 1, failures=(RuntimeError,))


def test_goal_stands_beside_the_peer_that_it_is_set_against() -> None:
    rows = rows_of(measure(), {"ours": [1.0], "llama.cpp": [1.0], "vLLM": [1.0]}, {})
    assert {one.peer: one.goal for one in rows} == {"llama.cpp": None, "vLLM": 0.7}


@pytest.mark.parametrize(("better", "best"), [("more", "vLLM"), ("less", "llama.cpp")])
def test_goal_of_the_best_stands_beside_the_fastest_peer(better: Better, best: str) -> None:
    found = {"ours": [1.0], "llama.cpp": [1.0], "vLLM": [2.0]}
    rows = rows_of(measure(better, BEST_OF_PEERS), found, {})
    assert [one.peer for one in rows if one.goal is not None] == [best]


def test_peer_that_could_not_be_set_up_has_a_row_that_says_why() -> None:
    rows = rows_of(measure(missing={"vLLM": "no package"}), {"ours": [1.0], "llama.cpp": [1.0]}, {})
    assert [(one.peer, one.problem, one.ratio) for one in rows] == [
        ("llama.cpp", None, 1.0),
        ("vLLM", "no package", None),
    ]
    assert "not measured: x, HTTP, beside vLLM: no package" in table(rows)


def test_when_our_side_breaks_every_row_says_so() -> None:
    rows = rows_of(measure(), {"llama.cpp": [1.0], "vLLM": [1.0]}, {"ours": "no memory"})
    assert {one.problem for one in rows} == {"ours: no memory"}


def test_table_shows_medians_and_marks_a_missed_goal() -> None:
    lines = table([row([100.0, 300.0, 200.0], [100.0, 100.0, 100.0], goal=2.5)]).splitlines()
    assert lines[2] == "| decode | engine | llama.cpp | 200 tokens/s | 100 tokens/s | **2.00** | ≥ 2.5 |"


def test_rows_survive_json() -> None:
    rows = [
        row([1.0, 2.0], [3.0, 4.0], goal=2.0),
        Row("x", "HTTP", "ms", "vLLM", "less", goal=0.7, problem="no package"),
    ]
    again = [from_json(json.loads(json.dumps(to_json(one)))) for one in rows]
    assert [(one.key, one.ratio, one.goal, one.problem) for one in again] == [
        (one.key, one.ratio, one.goal, one.problem) for one in rows
    ]


def test_a_record_of_something_else_is_refused() -> None:
    with pytest.raises(KeyError):
        from_json({"better": "sideways"})
