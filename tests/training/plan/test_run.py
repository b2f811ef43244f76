from __future__ import annotations

import json

import pytest

from training.errors import TrainingError
from training.plan.run import count_tokens, plan

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("text", "count"), [("780b", 780e9), ("20 M", 20e6), ("1.5e9", 1.5e9), ("1,000", 1000)])
def test_tokens_are_read_in_the_usual_spellings(text: str, count: float) -> None:
    assert count_tokens(text) == count


@pytest.mark.parametrize("text", ["", "many", "1.2.3b", "0", "-5b", "5x"])
def test_other_numbers_of_tokens_are_refused(text: str) -> None:
    with pytest.raises(TrainingError, match="is no number of tokens"):
        count_tokens(text)


def test_training_plan_names_layout_time_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(["train", "--model", "palm-540b", "--gpus", "512xh100", "--tokens", "780b"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("540.4 B parameters", "FSDP over 512 devices", "tensor parallelism", "time:", "cost: $", "35%"):
        assert words in printed


def test_plan_that_does_not_fit_says_so_and_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(["train", "--model", "palm-540b", "--gpus", "1xl4", "--tokens", "1b", "--micro-batch-size", "8"]) == 1
    assert "does NOT fit" in capsys.readouterr().out
    assert plan(["serve", "--model", "palm-540b", "--gpus", "1xl4"]) == 1
    assert "does NOT hold one" in " ".join(capsys.readouterr().out.split())


def test_plans_in_json_hold_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    plan(["train", "--model", "palm-8b", "--gpus", "8xh100", "--tokens", "100b", "--json"])
    trained = json.loads(capsys.readouterr().out)
    assert trained["total_bytes"] == pytest.approx(sum(trained["memory"].values()))
    assert trained["fits"] is True
    plan(["serve", "--model", "llama-7b", "--bits", "4", "--json"])
    served = json.loads(capsys.readouterr().out)
    assert served["dollars_per_year"] > 0
    assert served["bits"] == 4


@pytest.mark.parametrize(("what", "name"), [("sizes", "palm-2m"), ("devices", "h100")])
def test_tables_list_names(capsys: pytest.CaptureFixture[str], what: str, name: str) -> None:
    assert plan([what]) == 0
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["trian"]])
def test_misuse_is_answered_with_the_usage(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert plan(argv) == 2
    assert "usage: causerie plan" in capsys.readouterr().err


def test_rank_without_adapters_is_refused() -> None:
    with pytest.raises(TrainingError, match="no effect"):
        plan(["train", "--model", "palm-8b", "--gpus", "8xh100", "--tokens", "1b", "--lora-rank", "8"])
