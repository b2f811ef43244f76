"""Answers are what the engine sampled: the same for a seed, other for another, in order, with their ids."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from quant.progress import SilentProgress
from serving.model.chat_format import ChatMessage
from training.errors import TrainingError
from training.evaluate.answers import (
    Answer,
    AnswerOptions,
    AnswerSet,
    answer_questions,
    first_answers,
    write_answers,
)
from training.evaluate.player import Player
from training.evaluate.questions import Question, QuestionSet

pytestmark = pytest.mark.unit

OPTIONS = AnswerOptions(seed=1, max_new_tokens=6, temperature=1.0)


def ask(*texts: str, follow_ups: tuple[str, ...] = ()) -> QuestionSet:
    questions = tuple(
        Question(str(index), (ChatMessage("user", text),), follow_ups) for index, text in enumerate(texts)
    )
    return QuestionSet("questions", questions, (), len(questions))


def answers_of(player: Player, questions: QuestionSet, options: AnswerOptions = OPTIONS) -> AnswerSet:
    return answer_questions(player, questions, options, SilentProgress())


def test_the_same_seed_gives_the_same_answers_and_another_does_not(player: Player) -> None:
    questions = ask("Hello?", "How are you?")
    first = answers_of(player, questions)
    assert first == answers_of(player, questions)
    assert first != answers_of(player, questions, AnswerOptions(2, 6, 1.0))


def test_an_answer_depends_on_its_question_alone_not_on_the_others(player: Player) -> None:
    both = answers_of(player, ask("Hello?", "How are you?"))
    alone = answers_of(player, ask("Hello?"))
    assert both.answers[0].answer_ids == alone.answers[0].answer_ids


def test_two_questions_of_one_text_draw_different_answers(player: Player) -> None:
    answers = answers_of(player, ask("Hello?", "Hello?")).answers
    assert answers[0].answer_ids != answers[1].answer_ids


def test_the_first_of_many_choices_is_the_answer_drawn_alone(player: Player) -> None:
    many = answers_of(player, ask("Hello?"), AnswerOptions(1, 6, 1.0, num_choices=3))
    alone = answers_of(player, ask("Hello?"))
    assert [answer.choice for answer in many.answers] == [0, 1, 2]
    assert len({answer.answer_ids for answer in many.answers}) == 3
    assert [answer.answer_ids for answer in first_answers(many).values()] == [alone.answers[0].answer_ids]


def test_ids_text_and_logprobs_belong_together(player: Player) -> None:
    (answer,) = answers_of(player, ask("Hello?")).answers
    assert answer.prompt_ids == tuple(player.chat().render(answer.messages))
    assert len(answer.logprobs) == len(answer.answer_ids) == 6
    assert answer.finish_reason == "length"
    ids = [*answer.prompt_ids, *answer.answer_ids]
    (scored,) = player.logprobs([ids], SilentProgress(), "scoring")
    assert list(answer.logprobs) == pytest.approx(scored[len(answer.prompt_ids) - 1 :], abs=1e-3)


def test_a_second_turn_follows_the_models_own_first_answer(player: Player) -> None:
    first, second = answers_of(player, ask("Hello?", follow_ups=("And then?",))).answers
    assert (first.turn, second.turn) == (0, 1)
    assert second.messages == (
        ChatMessage("user", "Hello?"),
        ChatMessage("assistant", first.text),
        ChatMessage("user", "And then?"),
    )


def test_questions_without_room_are_left_out_and_counted(player: Player) -> None:
    found = answers_of(player, ask("word " * 600, "Hello?"))
    assert found.num_left_out == 1
    assert [answer.question_id for answer in found.answers] == ["1"]


def test_no_room_for_any_question_is_an_error(player: Player) -> None:
    with pytest.raises(TrainingError, match=r"no question .* leaves room for 2000 new tokens .*--max-new-tokens"):
        answers_of(player, ask("Hello?"), AnswerOptions(1, 2000, 1.0))


def test_answers_are_stored_one_a_line_and_read_back(player: Player, tmp_path: Path) -> None:
    answers = answers_of(player, ask("Hello?", "你好，世界！")).answers
    write_answers(tmp_path / "answers.jsonl", answers)
    lines = (tmp_path / "answers.jsonl").read_bytes().splitlines()
    assert [msgspec.json.decode(line, type=Answer) for line in lines] == list(answers)
