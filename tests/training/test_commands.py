"""`causerie train`: help that teaches, stages by name, errors of one line."""

from __future__ import annotations

import importlib

import pytest

from serving.cli import main
from training import settings
from training.commands import EVALUATE, STAGES, Stage, train

pytestmark = pytest.mark.unit


def test_help_lists_the_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in STAGES)
    assert "examples:" in shown


def test_a_mistyped_stage_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "rewrad"]) == 2
    assert "'rewrad' is no stage; did you mean 'reward'?" in capsys.readouterr().err


@pytest.mark.parametrize("stage", [*STAGES.values(), EVALUATE], ids=lambda stage: stage.settings)
def test_every_stage_exists(stage: Stage) -> None:

    module, _, function = stage.run.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert hasattr(settings, stage.settings)


def test_each_stages_help_names_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train(["ppo", "--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--kl-coefficient X" in shown
    assert "with --kl-control adaptive" in shown


def test_missing_options_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "sft"]) == 1
    assert capsys.readouterr().err == "causerie: missing --data, --out, --model\n"
