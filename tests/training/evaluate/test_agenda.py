"""What a run will do is settled, and what is wrong about it found, before any model is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.training.evaluate.tiny_models import write_llama
from training.errors import DataError, TrainingError
from training.evaluate.agenda import make_agenda
from training.evaluate.catalogue import GROUPS
from training.settings import EvaluateSettings

pytestmark = pytest.mark.unit

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture
def settings(model: Path, other_model: Path, tmp_path: Path) -> EvaluateSettings:
    return EvaluateSettings(model=model, out=tmp_path / "out", against=other_model, data=DATA, max_prompts=2)


def test_everything_that_the_flags_allow_is_on_by_default(settings: EvaluateSettings) -> None:
    agenda = make_agenda(replace(settings, reward_model=Path("judge")), {})
    assert agenda.groups == GROUPS
    assert agenda.skipped == {}
    assert set(agenda.passages) == {"ppl_books_en", "ppl_zh"}
    assert {name: len(one.questions) for name, one in agenda.questions.items()} == {
        "prompts": 2,
        "harmful": 2,
        "harmless": 2,
        "ifeval": 2,
        "gsm8k": 2,
        "mt_bench": 2,
        "vicuna": 2,
    }


def test_what_cannot_be_computed_is_left_out_with_its_reason(settings: EvaluateSettings) -> None:
    agenda = make_agenda(replace(settings, against=None), {})
    assert agenda.skipped == {"kl": "needs --against", "rewards": "needs --reward-model"}


def test_only_what_is_asked_for_needs_data(settings: EvaluateSettings, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some text.\n" * 100)
    agenda = make_agenda(replace(settings, data=None, measures=("texts",), texts=(text,)), {})
    assert (agenda.groups, dict(agenda.questions)) == (("texts",), {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "no evaluation data for prompts/val: name the directory with --data or CAUSERIE_DATA"),
        ({"data": None, "measures": ("texts",)}, "no evaluation data: name the directory with --data"),
        ({"data": Path("nowhere")}, r"nowhere has no prompts/val\.jsonl"),
        ({"data": Path("nowhere"), "measures": ("texts",)}, "nowhere has no eval/ppl_"),
        ({"measures": ("ifevl",)}, "'ifevl' is no group of measures; did you mean 'ifeval'"),
        ({"measures": ("rewards",)}, r"cannot be computed: rewards \(needs --reward-model\)"),
        ({"second_reward_model": Path("judge")}, "--second-reward-model has no effect without --reward-model"),
        ({"measures": ("texts",), "reward_model": Path("judge")}, "--reward-model has no effect with --measures texts"),
        ({"measures": ("kl",), "texts": (Path("a"),)}, "--texts has no effect with --measures kl; it is for texts"),
        ({"best_of": 4}, "--best-of 4 needs a --reward-model"),
        ({"best_of": 4, "reward_model": Path("judge"), "temperature": 0.0}, "--best-of 4 has no effect with"),
    ],
)
def test_contradictions_and_missing_data_are_refused(
    settings: EvaluateSettings, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        make_agenda(replace(settings, **changes), {})  # type: ignore[arg-type]


def test_the_environment_names_the_data_when_the_flag_does_not(settings: EvaluateSettings) -> None:
    assert make_agenda(replace(settings, data=None), {"CAUSERIE_DATA": str(DATA)}).questions["vicuna"].num_rows == 4


def test_kl_between_tokenizers_is_left_out_or_refused(settings: EvaluateSettings, tmp_path: Path) -> None:
    other = write_llama(tmp_path / "qwen", tokenizer="qwen3")
    assert "different tokenizers" in make_agenda(replace(settings, against=other), {}).skipped["kl"]
    with pytest.raises(TrainingError, match="different tokenizers"):
        make_agenda(replace(settings, against=other, measures=("kl",)), {})


def test_a_gate_on_what_is_not_computed_is_refused_before_the_run(settings: EvaluateSettings, tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text("win_rate_lower = {min = 0.5}\n")
    with pytest.raises(TrainingError, match="does not compute; it needs --measures rewards"):
        make_agenda(replace(settings, gate=rules), {})
    assert len(make_agenda(replace(settings, gate=rules, reward_model=Path("judge")), {}).rules) == 1


def test_passages_fit_into_the_smaller_of_the_two_contexts(settings: EvaluateSettings, tmp_path: Path) -> None:
    small = write_llama(tmp_path / "small", context=128)
    agenda = make_agenda(replace(settings, against=small), {})
    assert max(len(text.encode()) for texts in agenda.passages.values() for text in texts) <= 126


def test_a_broken_conversation_is_named_by_its_line(settings: EvaluateSettings, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    with pytest.raises(DataError, match="line 1: messages ends with role 'user'"):
        make_agenda(replace(settings, conversations=path), {})


def test_validation_texts_stay_out(settings: EvaluateSettings, tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    for name in ("ppl_some_test.txt", "ppl_some_valid.txt"):
        (tmp_path / "eval" / name).write_text("Some text.\n")
    agenda = make_agenda(replace(settings, data=tmp_path, measures=("texts",)), {})
    assert set(agenda.passages) == {"ppl_some_test"}


def test_a_model_is_not_replaced_by_its_report(settings: EvaluateSettings, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="exists and is no evaluation report"):
        make_agenda(replace(settings, out=settings.model), {})
    (tmp_path / "report.json").write_text("{}")
    assert make_agenda(replace(settings, out=tmp_path, measures=("texts",)), {}).groups == ("texts",)
