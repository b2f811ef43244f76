"""What is had from one load of a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quant.progress import SilentProgress
from training.evaluate.agenda import make_agenda
from training.evaluate.examine import Findings, examine
from training.settings import EvaluateSettings

pytestmark = pytest.mark.unit

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture(scope="module")
def settings(model: Path, other_model: Path) -> EvaluateSettings:
    return EvaluateSettings(
        model=model,
        out=Path("unused"),
        against=other_model,
        data=DATA,
        max_prompts=3,
        max_new_tokens=5,
        max_text_bytes=1024,
        precision="float32",
        kv_megabytes=8,
        measures=("texts", "kl"),
    )


@pytest.fixture(scope="module")
def findings(settings: EvaluateSettings) -> Findings:
    return examine(settings.model, settings, make_agenda(settings, {}), SilentProgress())


def test_every_sampled_id_is_scored_once_and_as_it_was_when_sampled(findings: Findings) -> None:
    assert len(findings.kl_answers) == 3
    for answer, scored in zip(findings.kl_answers, findings.kl_logprobs, strict=True):
        assert scored == pytest.approx(list(answer.logprobs), abs=1e-3)


def test_the_other_model_scores_the_same_ids(settings: EvaluateSettings, findings: Findings) -> None:
    agenda = make_agenda(settings, {})
    assert settings.against is not None
    other = examine(settings.against, settings, agenda, SilentProgress(), kl_answers=findings.kl_answers)
    assert other.kl_answers == findings.kl_answers
    assert [len(row or ()) for row in other.kl_logprobs] == [len(row or ()) for row in findings.kl_logprobs]
    assert other.kl_logprobs != findings.kl_logprobs


def test_what_is_not_on_the_agenda_is_not_asked(settings: EvaluateSettings) -> None:
    only_texts = replace(settings, measures=("texts",))
    findings = examine(settings.model, only_texts, make_agenda(only_texts, {}), SilentProgress())
    assert (dict(findings.answers), findings.kl_answers, findings.conversation_losses) == ({}, (), [])
    assert set(findings.text_losses) == {"ppl_books_en", "ppl_zh"}


def test_a_model_is_named_without_its_path(findings: Findings) -> None:
    assert findings.subject.name == "model"
    assert findings.subject.stage is None
    assert len(findings.subject.sha256) == 64
