"""A model's answers to a set of questions: sampled in the engine, deterministic by seed, stored as JSON lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import msgspec

from quant.progress import ProgressSink
from serving.engine.requests import FinishReason, GenerateRequest, SamplingParams, TokenEvent
from serving.model.chat_format import ChatMessage
from training.errors import TrainingError
from training.evaluate.player import Player
from training.evaluate.questions import Question, QuestionSet

__all__ = ["Answer", "AnswerOptions", "AnswerSet", "answer_questions", "first_answers", "write_answers"]


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """num_choices: answers to each question; each is the same whether or not others are drawn beside it."""

    seed: int
    max_new_tokens: int
    temperature: float
    num_choices: int = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as it was sampled. logprobs: of the answer's ids, under the model's own distribution.

    answer_ids hold the end-of-turn token where one was written; turn counts from 0.
    """

    question_id: str
    turn: int
    choice: int
    messages: tuple[ChatMessage, ...]
    text: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason

    @property
    def conversation(self) -> tuple[ChatMessage, ...]:
        """What a reward model reads."""
        return (*self.messages, ChatMessage("assistant", self.text))


@dataclass(frozen=True, slots=True)
class AnswerSet:
    """In the questions' order, then turns, then choices. num_left_out: questions without room in the context."""

    name: str
    answers: tuple[Answer, ...]
    num_left_out: int


@dataclass(frozen=True, slots=True)
class _Asked:
    question: Question
    messages: tuple[ChatMessage, ...]
    prompt_ids: tuple[int, ...]


def answer_questions(
    player: Player, questions: QuestionSet, options: AnswerOptions, progress: ProgressSink
) -> AnswerSet:
    """Answers to every turn that fits. Raises TrainingError if no question leaves room for an answer."""
    num_turns = 1 + max((len(question.follow_ups) for question in questions.questions), default=0)
    asked = [(question, question.messages) for question in questions.questions]
    answers: list[Answer] = []
    num_left_out = 0
    for turn in range(num_turns):
        fitting = _with_room(player, asked, options.max_new_tokens)
        if turn == 0:
            num_left_out = len(asked) - len(fitting)
            if not fitting:
                raise TrainingError(_no_room(player, questions, options))
        stage = f"{player.name}: {questions.name}" + (f", turn {turn + 1}" if num_turns > 1 else "")
        given = _sample(player, fitting, turn, options, progress, stage)
        answers += given
        asked = _follow_up(fitting, given, turn)
        if not asked:
            break
    order = {question.id: index for index, question in enumerate(questions.questions)}
    answers.sort(key=lambda answer: (order[answer.question_id], answer.turn, answer.choice))
    return AnswerSet(questions.name, tuple(answers), num_left_out)


def first_answers(answers: AnswerSet) -> dict[tuple[str, int], Answer]:
    """The first choice by (question, turn): what the model would have said without best-of-N."""
    return {(answer.question_id, answer.turn): answer for answer in answers.answers if answer.choice == 0}


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    path.write_bytes(b"".join(msgspec.json.encode(answer) + b"\n" for answer in answers))


def _with_room(
    player: Player, asked: Sequence[tuple[Question, tuple[ChatMessage, ...]]], max_new_tokens: int
) -> list[_Asked]:
    chat_format = player.chat()
    rendered = [_Asked(question, messages, tuple(chat_format.render(messages))) for question, messages in asked]
    return [one for one in rendered if len(one.prompt_ids) + max_new_tokens <= player.max_context]


def _no_room(player: Player, questions: QuestionSet, options: AnswerOptions) -> str:
    return (
        f"no question of {questions.name} leaves room for {options.max_new_tokens} new tokens in the context of "
        f"{player.name}, {player.max_context} tokens; lower --max-new-tokens"
    )


def _sample(
    player: Player, asked: Sequence[_Asked], turn: int, options: AnswerOptions, progress: ProgressSink, stage: str
) -> list[Answer]:
    requests = [
        GenerateRequest(
            request_id=str(index),
            prompt_ids=list(one.prompt_ids),
            sampling=SamplingParams(
                max_tokens=options.max_new_tokens,
                temperature=options.temperature,
                seed=_seed_of(options.seed, one.question.id, turn),
                num_top_logprobs=0,
            ),
            num_choices=options.num_choices,
        )
        for index, one in enumerate(asked)
    ]
    parts: dict[tuple[str, int], list[TokenEvent]] = {}
    for event in player.run(requests, progress, stage):
        assert isinstance(event, TokenEvent)
        parts.setdefault((event.request_id, event.choice_index), []).append(event)
    return [
        _joined(one, turn, choice, parts[str(index), choice])
        for index, one in enumerate(asked)
        for choice in range(options.num_choices)
    ]


def _joined(asked: _Asked, turn: int, choice: int, events: Sequence[TokenEvent]) -> Answer:
    reason = events[-1].finish_reason
    assert reason is not None
    return Answer(
        question_id=asked.question.id,
        turn=turn,
        choice=choice,
        messages=asked.messages,
        text="".join(event.text for event in events),
        prompt_ids=asked.prompt_ids,
        answer_ids=tuple(token_id for event in events for token_id in event.token_ids),
        logprobs=tuple(scored.logprob for event in events for scored in event.logprobs or ()),
        finish_reason=reason,
    )


def _follow_up(
    asked: Sequence[_Asked], given: Sequence[Answer], turn: int
) -> list[tuple[Question, tuple[ChatMessage, ...]]]:
    """The next turn of the questions that have one, after the first choice of this turn."""
    said = {answer.question_id: answer for answer in given if answer.choice == 0}
    return [
        (one.question, (*said[one.question.id].conversation, ChatMessage("user", one.question.follow_ups[turn])))
        for one in asked
        if turn < len(one.question.follow_ups) and said[one.question.id].text.strip()
    ]


def _seed_of(seed: int, question_id: str, turn: int) -> int:
    """Of its own for each question: one seed for all would draw the same luck for all."""
    return int.from_bytes(blake2b(f"{seed}/{question_id}/{turn}".encode(), digest_size=6).digest(), "little")
