"""`causerie evaluate` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serving.cli import main

pytestmark = pytest.mark.unit

DATA = Path(__file__).parents[2] / "data"


def arguments(model: Path, out: Path, *more: str) -> list[str]:
    few = ["--max-prompts", "2", "--max-new-tokens", "4", "--precision", "float32", "--kv-megabytes", "8"]
    return ["evaluate", str(model), "--out", str(out), "--data", str(DATA), "--measures", "lengths", *few, *more]


def test_the_model_is_the_first_word_and_the_report_appears(model: Path, tmp_path: Path) -> None:
    assert main(arguments(model, tmp_path / "report")) == 0
    assert json.loads((tmp_path / "report" / "report.json").read_text())["model"]["name"] == "model"


def test_a_broken_gate_rule_is_exit_code_1_with_a_table(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text("answer_tokens = {max = 1}\nanswers_ended = {min = 0}\n")
    assert main(arguments(model, tmp_path / "report", "--gate", str(rules))) == 1
    printed = capsys.readouterr()
    assert "FAILED  answer_tokens" in printed.out
    assert "kept    answers_ended" in printed.out
    assert "model fails 1 of 2 gate rules: answer_tokens" in printed.err


def test_a_contradiction_is_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(model, tmp_path / "report", "--best-of", "4")) == 1
    assert capsys.readouterr().err == "causerie: --best-of 4 needs a --reward-model to choose by\n"
    assert not (tmp_path / "report").exists()


def test_a_judge_that_is_none_is_refused_before_any_sampling(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(model, tmp_path / "report", "--measures", "rewards", "--reward-model", str(model))) == 1
    printed = capsys.readouterr()
    assert "has no reward.json" in printed.err
    assert "prompts" not in printed.err
