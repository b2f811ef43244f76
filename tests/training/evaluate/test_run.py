"""A whole evaluation of two tiny models: what is written, what the figures say of each other, and the gate."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image

from quant.progress import SilentProgress
from tests.training.evaluate.tiny_models import load_fake_scorer
from training.errors import TrainingError
from training.evaluate import run as run_module
from training.evaluate.catalogue import CATALOGUE
from training.evaluate.gate import GateFailed
from training.evaluate.report import Evaluation
from training.evaluate.run import evaluate, load_scorer, run
from training.reward_model import RewardRecord, save_reward_head
from training.settings import EvaluateSettings

pytestmark = pytest.mark.unit

DATA = Path(__file__).parents[2] / "data"


def settings_of(model: Path, out: Path) -> EvaluateSettings:
    return EvaluateSettings(
        model=model,
        out=out,
        data=DATA,
        max_prompts=2,
        max_new_tokens=4,
        max_text_bytes=1024,
        precision="float32",
        kv_megabytes=8,
        reward_model=Path("long"),
    )


@pytest.fixture(scope="module")
def full(
    model: Path, other_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Evaluation, Path, dict[str, Any]]:
    """Every measure at once; (evaluation, directory, report.json)."""
    out = tmp_path_factory.mktemp("evaluation") / "report"
    settings = replace(settings_of(model, out), against=other_model, second_reward_model=Path("short"), best_of=3)
    evaluation = evaluate(settings, load_fake_scorer, SilentProgress())
    return evaluation, out, json.loads((out / "report.json").read_text(encoding="utf-8"))


def test_every_measure_of_the_catalogue_is_computed(full: tuple[Evaluation, Path, dict[str, Any]]) -> None:
    evaluation, _, report = full
    assert set(evaluation.new) == set(CATALOGUE)
    assert set(evaluation.old) == {name for name, info in CATALOGUE.items() if not info.is_pairwise}
    assert set(report["measures"]) == set(CATALOGUE)
    assert report["questions"]["prompts"] == 2


def test_judges_of_opposite_taste_disagree_wherever_one_wins(full: tuple[Evaluation, Path, dict[str, Any]]) -> None:
    evaluation, _, _ = full
    assert evaluation.new["win_rate"].value == 1 - evaluation.new["second_win_rate"].value
    assert evaluation.new["reward_gain"].value == -evaluation.new["second_reward_gain"].value
    assert evaluation.new["best_of_reward_gain"].value >= 0 >= evaluation.new["second_best_of_reward_gain"].value
    curve = evaluation.best_of
    assert curve is not None
    assert curve.second == tuple(-value for value in curve.first)


def test_the_directory_holds_report_answers_plots_and_pages(full: tuple[Evaluation, Path, dict[str, Any]]) -> None:
    _, out, _ = full
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    sets = ("gsm8k", "harmful", "harmless", "ifeval", "mt_bench", "prompts", "vicuna")
    assert files == sorted(
        [
            "report.json",
            "report.md",
            *(f"answers/{role}_{name}.jsonl" for role in ("new", "old") for name in sets),
            *(f"plots/{name}.png" for name in ("ifeval", "lengths", "reward_kl", "shares", "win_rate")),
            *(f"pages/{name}.html" for name in ("gsm8k", "index", "mt_bench", "vicuna")),
        ]
    )
    for path in (out / "plots").iterdir():
        with Image.open(path) as picture:
            assert min(picture.size) > 150


def test_the_report_knows_no_place_on_this_machine(full: tuple[Evaluation, Path, dict[str, Any]], model: Path) -> None:
    _, out, _ = full
    for path in (out / "report.json", out / "report.md", *(out / "pages").iterdir()):
        assert str(model.parent) not in path.read_text(encoding="utf-8"), path.name


def test_the_report_says_what_the_json_says(full: tuple[Evaluation, Path, dict[str, Any]]) -> None:
    evaluation, out, _ = full
    text = (out / "report.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in text for name in CATALOGUE)
    assert f"{evaluation.new['answer_tokens'].value:.3g}" in text
    assert "# Evaluation of model against other" in text
    assert all(f"| {name} |" in text for name in evaluation.perplexity_by_text)


def test_a_model_against_itself_differs_in_nothing(model: Path, tmp_path: Path) -> None:
    settings = replace(
        settings_of(model, tmp_path / "out"), against=model, measures=("texts", "conversations", "kl", "rewards")
    )
    evaluation = evaluate(settings, load_fake_scorer, SilentProgress())
    new = evaluation.new
    assert new["win_rate"].value == 0.5
    assert new["perplexity_increase_percent"].value == pytest.approx(0, abs=1e-6)
    assert new["answer_perplexity_increase_percent"].value == pytest.approx(0, abs=1e-6)
    assert new["kl_per_token"].value == pytest.approx(0, abs=1e-6)
    assert (evaluation.model.name, cast("Any", evaluation.against).name) == ("model (new)", "model (old)")


def test_kl_is_measured_at_temperature_one_whatever_the_answers_are_sampled_at(
    model: Path, other_model: Path, tmp_path: Path
) -> None:
    settings = replace(settings_of(model, tmp_path / "out"), against=other_model, measures=("kl",), reward_model=None)
    at_one = evaluate(settings, load_fake_scorer, SilentProgress())
    greedy = evaluate(replace(settings, temperature=0.0), load_fake_scorer, SilentProgress())
    assert greedy.new["kl_per_token"].value == pytest.approx(at_one.new["kl_per_token"].value, abs=1e-5)


def test_a_run_that_fails_leaves_the_old_report_untouched(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text("the old one")
    settings = replace(settings_of(model, out), measures=("rewards",), reward_model=Path("no judge"))
    with pytest.raises(TrainingError, match="is no judge"):
        evaluate(settings, load_fake_scorer, SilentProgress())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "report.json").read_text() == "the old one"


def test_a_reward_models_directory_is_a_judge(model: Path, tmp_path: Path) -> None:
    """Through the loader that the command uses."""
    judge = tmp_path / "judge"
    shutil.copytree(model, judge)
    head = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    save_reward_head(judge, head, RewardRecord(mean=0.5, deviation=2.0, trunk_sha256="0" * 64, length=256))
    settings = replace(settings_of(model, tmp_path / "out"), measures=("rewards",), reward_model=judge)
    evaluation = evaluate(settings, load_scorer, SilentProgress())
    assert evaluation.judges == ("judge",)
    assert evaluation.new["reward"].count == 2


@pytest.mark.parametrize(("bound", "passes"), [("min = 0.0", True), ("max = -1.0", False)])
def test_the_gate_decides_after_the_report_is_written(
    model: Path,
    tmp_path: Path,
    bound: str,
    passes: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run_module, "load_scorer", load_fake_scorer)
    monkeypatch.setattr(run_module, "check_scorer", load_fake_scorer)
    rules = tmp_path / "rules.toml"
    rules.write_text(f"answers_ended = {{max = 1}}\nreward = {{{bound}}}\n")
    settings = replace(settings_of(model, tmp_path / "out"), measures=("rewards", "lengths"), gate=rules)
    if passes:
        run(settings)
    else:
        with pytest.raises(GateFailed, match="model fails 1 of 2 gate rules: reward"):
            run(settings)
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["passes_gate"] is passes
    assert [ruling["kept"] for ruling in report["gate"]] == [True, passes]
    assert ("FAILED  reward" in capsys.readouterr().out) is not passes


def test_two_runs_of_one_seed_write_the_same_report(model: Path, tmp_path: Path) -> None:
    texts: list[str] = []
    for name in ("first", "second"):
        settings = replace(settings_of(model, tmp_path / name / "out"), measures=("rewards", "lengths", "ifeval"))
        evaluate(settings, load_fake_scorer, SilentProgress())
        texts.append((tmp_path / name / "out" / "report.json").read_text())
        shutil.rmtree(tmp_path / name)
    assert texts[0] == texts[1]
