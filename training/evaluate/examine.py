"""One model's turn: everything that needs its weights, in one load. What the answers are worth comes later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from quant.model_directory import hash_directory, read_manifest
from quant.progress import ProgressSink
from training.evaluate.agenda import Agenda
from training.evaluate.answers import Answer, AnswerOptions, AnswerSet, answer_questions
from training.evaluate.perplexity import Loss, conversation_losses, passage_losses
from training.evaluate.player import Player, load_player
from training.settings import EvaluateSettings

__all__ = ["Findings", "Subject", "examine"]


@dataclass(frozen=True, slots=True)
class Subject:
    """Which model it was: name without a path, content hash, and the stage that made it (None without a manifest)."""

    name: str
    sha256: str
    stage: str | None


@dataclass(frozen=True, slots=True)
class Findings:
    """losses: None where a text does not fit this model.

    kl_answers: answers at temperature 1 of the model that KL is measured on; kl_logprobs: this model's
    log-probability of each of their ids, None where its context is too short.
    """

    subject: Subject
    text_losses: Mapping[str, list[Loss | None]]
    conversation_losses: list[Loss | None]
    answers: Mapping[str, AnswerSet]
    kl_answers: tuple[Answer, ...]
    kl_logprobs: list[list[float] | None]


def examine(
    directory: Path,
    settings: EvaluateSettings,
    agenda: Agenda,
    progress: ProgressSink,
    *,
    kl_answers: tuple[Answer, ...] | None = None,
) -> Findings:
    """kl_answers: another model's answers to score, instead of answers of its own."""
    player = load_player(directory, precision=settings.precision, kv_megabytes=settings.kv_megabytes)
    answers = {name: _answers(player, name, settings, agenda, progress) for name in agenda.questions}
    if kl_answers is None and "kl" in agenda.groups:
        kl_answers = _kl_answers(player, answers["prompts"], settings, agenda, progress)
    return Findings(
        subject=_subject(directory),
        text_losses={
            name: passage_losses(player, passages, progress, f"{player.name}: {name}")
            for name, passages in agenda.passages.items()
        },
        conversation_losses=conversation_losses(
            player, agenda.conversations, progress, f"{player.name}: conversations"
        ),
        answers=answers,
        kl_answers=kl_answers or (),
        kl_logprobs=_score_answers(player, kl_answers or (), progress),
    )


def _subject(directory: Path) -> Subject:
    manifest = read_manifest(directory)
    stage = None if manifest is None else manifest.stage
    return Subject(directory.absolute().name, hash_directory(directory), stage)


def _answers(
    player: Player, name: str, settings: EvaluateSettings, agenda: Agenda, progress: ProgressSink
) -> AnswerSet:
    options = AnswerOptions(settings.seed, settings.max_new_tokens, settings.temperature)
    if name == "prompts":
        options = replace(options, num_choices=settings.best_of)
    return answer_questions(player, agenda.questions[name], options, progress)


def _kl_answers(
    player: Player, answers: AnswerSet, settings: EvaluateSettings, agenda: Agenda, progress: ProgressSink
) -> tuple[Answer, ...]:
    """The mean log ratio is KL only on answers drawn from the model itself, at temperature 1."""
    if settings.temperature == 1:
        return tuple(answer for answer in answers.answers if answer.choice == 0)
    options = AnswerOptions(settings.seed, settings.max_new_tokens, 1.0)
    questions = replace(agenda.questions["prompts"], name="prompts at temperature 1")
    return answer_questions(player, questions, options, progress).answers


def _score_answers(player: Player, answers: tuple[Answer, ...], progress: ProgressSink) -> list[list[float] | None]:
    """The sampled ids themselves are scored, never their text again."""
    sequences = [[*answer.prompt_ids, *answer.answer_ids] for answer in answers]
    fits = [len(ids) <= player.max_context for ids in sequences]
    fitting = [ids for ids, ok in zip(sequences, fits, strict=True) if ok]
    scored = iter(player.logprobs(fitting, progress, f"{player.name}: scoring answers"))
    return [
        # The id at position i has its score at i - 1.
        next(scored)[len(answer.prompt_ids) - 1 :] if ok else None
        for answer, ok in zip(answers, fits, strict=True)
    ]
