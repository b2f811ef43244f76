"""The tiny pipeline's bookkeeping: gains read from manifests, refusals before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from quant.model_directory import JsonValue
from training.errors import TrainingError
from training.pipeline import Gain, _gain, choose_rows, report, run

pytestmark = pytest.mark.unit

SIGNS: dict[str, JsonValue] = {"held_out_rows_better": 9, "held_out_rows_worse": 1}


def test_a_stages_gain_is_read_from_its_manifest() -> None:
    found = _gain("sft", {"held_out_loss_before": 3.0, "held_out_loss": 2.0, **SIGNS}, 5.0)
    assert (found.before, found.after, found.better, found.worse) == (3.0, 2.0, 9, 1)
    assert found.p_value == pytest.approx(11 / 1024)
    assert found.is_better


def test_a_reward_models_gain_is_its_right_pairs_against_chance() -> None:
    metrics = {"accuracy_before": {"value": 0.5, "count": 40}, "accuracy": {"value": 0.75, "count": 40}}
    found = _gain("reward", metrics, 5.0)
    assert (found.better, found.worse) == (30, 10)


def test_ppos_gain_is_the_reward_of_held_out_answers() -> None:
    found = _gain("ppo", {"held_out_reward_before": 0.1, "held_out_reward": 0.4, **SIGNS}, 5.0)
    assert (found.measure, found.before, found.after) == ("reward of an answer", 0.1, 0.4)


def test_a_few_lucky_rows_are_no_gain() -> None:
    assert not Gain("sft", "loss", 2.0, 1.9, 3, 1, 1.0).is_better


def test_the_report_says_whether_the_rule_was_followed(capsys: pytest.CaptureFixture[str]) -> None:
    report([Gain("sft", "loss", 2.0, 1.9, 9, 1, 1.0)], "How many?", "Seven hens.", 12.0)
    shown = capsys.readouterr().out
    assert "9/1" in shown
    assert "This answer does." in shown


def test_an_output_that_exists_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(TrainingError, match="is not empty; choose another --out"):
        run(["--tiny", "--out", str(tmp_path)])


def test_the_bundled_rows_are_there(tmp_path: Path) -> None:
    rows = choose_rows(None, tmp_path)
    assert rows.text.is_file()
    assert rows.conversations.is_file()
    assert (rows.generated / "rankings.jsonl").is_file()
