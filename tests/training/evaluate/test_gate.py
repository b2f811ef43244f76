"""Rules are read strictly, decided on the right number, and never pass by default."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.errors import TrainingError
from training.evaluate.catalogue import computed_measures
from training.evaluate.gate import Rule, apply_rules, check_rules, gate_table, read_rules
from training.evaluate.intervals import Measure

pytestmark = pytest.mark.unit

NEW = {"win_rate": Measure(0.6, 0.45, 0.74, 40), "perplexity": Measure(12.0, None, None, 1)}
OLD = {"perplexity": Measure(11.5, None, None, 1)}


def rules_of(path: Path, text: str) -> tuple[Rule, ...]:
    path.write_text(text, encoding="utf-8")
    return read_rules(path)


def test_rules_are_read_with_their_bounds(tmp_path: Path) -> None:
    rules = rules_of(tmp_path / "rules.toml", "win_rate_lower = {min = 0.5}\nperplexity = {min = 1, max = 20.5}\n")
    assert rules == (Rule("win_rate_lower", 0.5, None), Rule("perplexity", 1, 20.5))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("win_rat = {min = 0.5}", "'win_rat' names no measure; did you mean 'win_rate'"),
        ("win_rate_lowr = {min = 0.5}", "did you mean 'win_rate_lower'"),
        ("win_rate = 0.5", "is 0.5; expected {min = X}, {max = X} or both"),
        ("win_rate = {}", "is {}; expected {min = X}, {max = X} or both"),
        ("win_rate = {minimum = 0.5}", "has 'minimum'; expected min or max"),
        ("win_rate = {min = 'half'}", "min is 'half'; expected a number"),
        ("win_rate = {min = nan}", "min is nan; expected a number"),
        ("win_rate = {min = 0.9, max = 0.1}", "can never be kept"),
        ("", "hold no rule"),
        ("win_rate =", "not valid TOML"),
    ],
)
def test_what_is_no_rule_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        rules_of(tmp_path / "rules.toml", text)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cannot be read: No such file"):
        read_rules(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("win_rate", 0.6),
        ("win_rate_lower", 0.45),
        ("win_rate_upper", 0.74),
        ("perplexity_change", 0.5),
    ],
)
def test_a_rule_is_on_the_number_that_it_names(name: str, value: float) -> None:
    (ruling,) = apply_rules([Rule(name, 0.0, None)], NEW, OLD)
    assert ruling.value == pytest.approx(value)


@pytest.mark.parametrize(
    ("low", "high", "is_kept"),
    [(0.6, None, True), (0.61, None, False), (None, 0.6, True), (None, 0.59, False), (0.5, 0.7, True)],
)
def test_bounds_are_inclusive(low: float | None, high: float | None, is_kept: bool) -> None:
    (ruling,) = apply_rules([Rule("win_rate", low, high)], NEW, OLD)
    assert ruling.is_kept is is_kept


def test_a_value_that_is_no_number_keeps_no_rule() -> None:
    (ruling,) = apply_rules([Rule("win_rate", None, 1.0)], {"win_rate": Measure(float("nan"), None, None, 1)}, {})
    assert not ruling.is_kept


@pytest.mark.parametrize("name", ["refusal_harmful", "perplexity_lower", "win_rate_change"])
def test_a_rule_on_what_was_not_computed_is_an_error_not_a_pass(name: str) -> None:
    with pytest.raises(TrainingError, match=f"{name!r} cannot be decided"):
        apply_rules([Rule(name, None, 100.0)], NEW, OLD)


def test_a_rule_that_this_run_will_not_compute_is_refused_before_it() -> None:
    computed = computed_measures(("texts",), {"against"})
    check_rules([Rule("perplexity_increase_percent", None, 3)], computed, True)
    with pytest.raises(TrainingError, match="needs --measures rewards and --against --reward-model"):
        check_rules([Rule("win_rate_lower", 0.5, None)], computed, True)
    with pytest.raises(TrainingError, match="needs --against"):
        check_rules([Rule("perplexity_change", None, 1)], computed_measures(("texts",), set()), False)
    with pytest.raises(TrainingError, match="compares the models already"):
        check_rules([Rule("perplexity_increase_percent_change", None, 1)], computed, True)


def test_the_table_says_which_rule_failed() -> None:
    rulings = apply_rules([Rule("win_rate_lower", 0.5, None), Rule("perplexity", None, 20)], NEW, OLD)
    assert gate_table(rulings).splitlines() == [
        "FAILED  win_rate_lower        0.45  at least 0.5",
        "kept    perplexity              12  at most 20",
    ]
