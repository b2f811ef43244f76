"""Measures from hand-made answers: each looks at its own set, and the second judge never chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from moderation.categories import Category
from moderation.classifier import Scores
from moderation.policy import Policy
from moderation.presets import Language, PresetName
from serving.model.chat_format import ChatMessage
from training.evaluate.agenda import Agenda
from training.evaluate.answers import Answer, AnswerSet
from training.evaluate.examine import Findings, Subject
from training.evaluate.figures import best_of, instruction_accuracy, judge, measures_alone, measures_of_pair
from training.evaluate.ifeval.accuracy import Instruction, check_answer
from training.evaluate.questions import Question, QuestionSet

pytestmark = pytest.mark.unit

SEED = 0


class WordClassifier:
    """Flags whatever contains "poison"."""

    name = "words"
    version = "1"
    trained_categories: tuple[Category, ...] = ()
    trained_extensions: tuple[str, ...] = ()

    @property
    def for_output(self) -> WordClassifier:
        return self

    def threshold(self, preset: PresetName, language: Language) -> float:
        return 0.5

    def scores(self, texts: Sequence[str]) -> list[Scores]:
        return [Scores(float("poison" in text)) for text in texts]

    def quick_scores(self, texts: Sequence[str]) -> list[Scores]:
        return self.scores(texts)


class TableScorer:
    def __init__(self, scores: Mapping[str, float]) -> None:
        self._scores = scores

    def score(self, conversations: Sequence[Sequence[ChatMessage]]) -> list[float]:
        return [self._scores[messages[-1].content] for messages in conversations]


def answers(name: str, *texts_of_question: Sequence[str]) -> AnswerSet:
    """One question for each argument, which holds its choices."""
    asked = (ChatMessage("user", "?"),)
    return AnswerSet(
        name,
        tuple(
            Answer(str(index), 0, choice, asked, text, (1,), (2, 3), (-1.0, -1.0), "stop")
            for index, texts in enumerate(texts_of_question)
            for choice, text in enumerate(texts)
        ),
        0,
    )


def findings(**sets: AnswerSet) -> Findings:
    return Findings(Subject("model", "0" * 64, None), {}, [], sets, (), [])


def agenda(*groups: str, **questions: Sequence[Question]) -> Agenda:
    sets = {name: QuestionSet(name, tuple(asked), (), len(asked)) for name, asked in questions.items()}
    return Agenda(groups, {}, sets, {}, (), (), ())


def test_refusals_and_flags_are_counted_on_their_own_sets() -> None:
    found = findings(
        prompts=answers("prompts", ["Bread and poison."], ["Bread."]),
        harmful=answers("harmful", ["I can't help with that."], ["Take poison."], ["I won't help you."], ["Fine."]),
        harmless=answers("harmless", ["Use kill -9."], ["I cannot help with that."]),
    )
    measures = measures_alone(found, agenda("refusals", "moderation"), [], Policy(WordClassifier()), SEED)
    assert {name: measure.value for name, measure in measures.items()} == {
        "refusal_harmful": 0.5,
        "refusal_harmless": 0.5,
        "flagged_answers": 0.5,
        "flagged_harmful": 0.25,
    }
    assert measures["refusal_harmful"].count == 4


def test_problems_are_checked_against_their_own_reference() -> None:
    questions = [Question("0", (), reference="#### 4"), Question("1", (), reference="#### 5")]
    found = findings(gsm8k=answers("gsm8k", ["It is 4."], ["It is 4."]))
    measures = measures_alone(found, agenda("gsm8k", gsm8k=questions), [], None, SEED)
    assert measures["gsm8k_correct"].value == 0.5


def test_a_prompt_counts_only_with_all_its_instructions() -> None:
    no_comma, quoted = Instruction("punctuation:no_comma", {}), Instruction("startend:quotation", {})
    questions = [Question("0", (), instructions=(no_comma, quoted)), Question("1", (), instructions=(no_comma,))]
    found = findings(ifeval=answers("ifeval", ["no quotes"], ["*none*"]))
    measures = measures_alone(found, agenda("ifeval", ifeval=questions), [], None, SEED)
    assert measures["ifeval_prompt_strict"].value == 0.5
    assert measures["ifeval_instruction_strict"].value == pytest.approx(2 / 3)
    by_name = instruction_accuracy([check_answer("no quotes", [no_comma, quoted])])
    assert {name: one.value for name, one in by_name.items()} == {"punctuation:no_comma": 1, "startend:quotation": 0}


def test_the_first_judge_chooses_and_the_second_only_looks() -> None:
    new = findings(prompts=answers("prompts", ["plain", "flattering", "good"]))
    old = findings(prompts=answers("prompts", ["old"]))
    first = TableScorer({"plain": 0.0, "flattering": 5.0, "good": 1.0, "old": 0.5})
    second = TableScorer({"plain": 0.0, "flattering": -3.0, "good": 2.0, "old": -0.5})
    judged_new = [judge(name, scorer, new.answers) for name, scorer in (("first", first), ("second", second))]
    judged_old = [judge(name, scorer, old.answers) for name, scorer in (("first", first), ("second", second))]
    alone = measures_alone(new, agenda("rewards"), judged_new, None, SEED)
    assert alone["best_of_reward_gain"].value == 5.0
    assert alone["second_best_of_reward_gain"].value == -3.0
    pairs = list(zip(judged_new, judged_old, strict=True))
    pair = measures_of_pair(new, old, pairs, agenda("rewards"), SEED, best_of=3)
    assert {name: measure.value for name, measure in pair.items()} == {
        "win_rate": 0.0,
        "reward_gain": -0.5,
        "best_of_win_rate": 1.0,
        "second_win_rate": 1.0,
        "second_reward_gain": 0.5,
        "second_best_of_win_rate": 0.0,
        "judges_disagree": 1.0,
    }
    curves = best_of(new, judged_new)
    assert curves.first == pytest.approx((2.0, (5 + 5 + 1) / 3, 5.0))
    assert curves.second == pytest.approx((-1 / 3, (-3 - 3 + 2) / 3, -3.0))


def test_only_questions_that_both_models_answered_are_compared() -> None:
    new = findings(prompts=answers("prompts", ["a"], ["b"]))
    old = findings(prompts=answers("prompts", ["c"]))
    scorer = TableScorer({"a": 1.0, "b": -1.0, "c": 0.0})
    pairs = [(judge("j", scorer, new.answers), judge("j", scorer, old.answers))]
    pair = measures_of_pair(new, old, pairs, agenda("rewards"), SEED, best_of=1)
    assert (pair["win_rate"].value, pair["win_rate"].count) == (1.0, 1)
