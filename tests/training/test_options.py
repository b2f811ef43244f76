"""Settings from defaults, a recipe and flags: precedence, ranges, and no mistyped or idle option."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from training import settings as all_settings
from training.commands import EVALUATE, STAGES
from training.errors import TrainingError
from training.options import RECIPES, build_settings, read_recipe, read_settings, record_of
from training.settings import GrpoSettings, PpoSettings, PretrainSettings, SftSettings

pytestmark = pytest.mark.unit

NEEDED = ["--model", "base", "--data", "a.jsonl", "--out", "out"]


def read_sft(*flags: str) -> SftSettings:
    return read_settings(SftSettings, "train sft", [*NEEDED, *flags], description="")


def test_a_flag_overrides_a_recipe_which_overrides_the_default(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[sft]\nlearning-rate = 3e-4\nlength = 64\nmethod = "full"\n')
    found = read_sft("--recipe", str(recipe), "--length", "32")
    assert (found.learning_rate, found.length, found.epochs) == (3e-4, 32, 1.0)
    assert found.data == (Path("a.jsonl"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sft]\nlearnig_rate = 1.0", "did you mean 'learning_rate'"),
        ("[reward]\nlength = 64", r"has no table \[sft\]; it has: reward"),
        ("[sft]\nlength = 64.5", "length must be a whole number; found 64.5"),
        ("[sft]\nlength = 8", "length must be at least 16; found 8"),
        ('[sft]\nmethod = "half"', "'full' or 'lora' or 'qlora'; found 'half'"),
        ("[sft]\nlearning_rate = 0", "learning_rate must be above 0"),
        ("[sft]\npacking = 1", "packing must be true or false"),
        ("[sft", "is not valid TOML"),
    ],
)
def test_a_recipe_with_a_mistake_is_refused(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(text)
    with pytest.raises(TrainingError, match=message):
        read_sft("--recipe", str(recipe))


def test_a_flag_without_effect_is_refused() -> None:
    with pytest.raises(TrainingError, match="--lora-rank has no effect with --method full; it needs --method lora"):
        read_sft("--method", "full", "--lora-rank", "8")


def test_a_recipe_may_hold_what_another_mode_needs(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("[sft]\nlora_rank = 8\n")
    assert read_sft("--recipe", str(recipe), "--method", "full").lora_rank == 8


def test_a_mistyped_flag_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        read_sft("--learning-rat", "1")
    assert stopped.value.code == 2
    assert "--learning-rat" in capsys.readouterr().err


def test_what_is_required_is_named() -> None:
    with pytest.raises(TrainingError, match="missing --data, --out, --model"):
        read_settings(SftSettings, "train sft", [], description="")


def test_an_unknown_recipe_names_the_bundled_ones() -> None:
    with pytest.raises(TrainingError, match=r"neither a .toml file nor one of: 135m, 13b, 7b, tiny"):
        read_recipe("8b", "sft", SftSettings)


@pytest.mark.parametrize("name", ["tiny", "135m", "7b", "13b"])
@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo"])
def test_bundled_recipes_are_valid(name: str, stage: str) -> None:
    kind: Any = getattr(all_settings, STAGES[stage].settings)
    values = read_recipe(name, stage, kind)
    required = {"out": "o", "data": ("d",), "model": "m", "reward_model": "r"}
    names = {spec.name for spec in fields(kind)}
    build_settings(kind, {**{key: value for key, value in required.items() if key in names}, **values})


def test_no_recipe_is_without_a_test() -> None:
    assert sorted(path.stem for path in RECIPES.glob("*.toml")) == ["135m", "13b", "7b", "tiny"]


@pytest.mark.parametrize("stage", [*STAGES.values(), EVALUATE], ids=lambda stage: stage.settings)
def test_every_option_says_what_it_is(stage: Any) -> None:
    kind: Any = getattr(all_settings, stage.settings)
    assert kind.__doc__
    for spec in fields(kind):
        assert spec.metadata["about"].help, spec.name
        applies = spec.metadata["about"].applies
        assert applies is None or applies.name in {other.name for other in fields(kind)}


def test_the_record_holds_no_path() -> None:
    settings = build_settings(
        PretrainSettings, {"out": "/somewhere/base", "data": ["/somewhere/else/a.jsonl"], "seed": 3}
    )
    record = record_of(settings)
    assert record["data"] == ["a.jsonl"]
    assert record["seed"] == 3
    assert "somewhere" not in repr(record)


def test_settings_cannot_be_changed_after_they_were_checked() -> None:
    settings = build_settings(SftSettings, {"out": "o", "data": ["d"], "model": "m"})
    with pytest.raises(AttributeError):
        settings.length = 5  # pyright: ignore[reportAttributeAccessIssue]


def test_stages_share_the_words_of_their_options() -> None:
    shared = {spec.name for spec in fields(PpoSettings)} & {spec.name for spec in fields(GrpoSettings)}
    assert {"temperature", "max_new_tokens", "kl_coefficient", "missing_end_penalty"} <= shared
