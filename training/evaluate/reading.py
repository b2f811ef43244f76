"""Which answers go on which page to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from training.evaluate.agenda import Agenda
from training.evaluate.answers import Answer, first_answers
from training.evaluate.examine import Findings
from training.evaluate.figures import Judged
from training.evaluate.gsm8k import is_correct
from training.evaluate.pages import Page, PageAnswer, PageItem

__all__ = ["Contender", "make_pages"]

_TITLES = {
    "gsm8k": ("GSM8K", "Grade-school problems; right means the same final number as the reference."),
    "mt_bench": ("MT-Bench", "Two turns: the second question follows the model's own first answer."),
    "vicuna": ("Vicuna", "Open questions."),
}


@dataclass(frozen=True, slots=True)
class Contender:
    """A model's answers, and the scores that each judge gave them."""

    findings: Findings
    judged: tuple[Judged, ...]


def make_pages(contenders: Sequence[Contender], agenda: Agenda) -> list[Page]:
    """One page a set that was asked; the first contender is the new model."""
    return [_page(name, contenders, agenda) for name in _TITLES if name in agenda.questions]


def _page(name: str, contenders: Sequence[Contender], agenda: Agenda) -> Page:
    title, about = _TITLES[name]
    answers = [first_answers(one.findings.answers[name]) for one in contenders]
    items: list[PageItem] = []
    for question in agenda.questions[name].questions:
        asked = (question.messages[-1].content, *question.follow_ups)
        for turn, text in enumerate(asked):
            key = (question.id, turn)
            given = [(one, found[key]) for one, found in zip(contenders, answers, strict=True) if key in found]
            if given:
                items.append(
                    PageItem(
                        title=_item_title(question.id, question.category, turn, len(asked)),
                        question=text,
                        answers=tuple(_page_answer(name, one, answer, question.reference) for one, answer in given),
                        reference=question.reference if turn == 0 else None,
                    )
                )
    return Page(f"{name}.html", title, about, tuple(items))


def _item_title(question_id: str, category: str, turn: int, num_turns: int) -> str:
    parts = [question_id, *([category] if category else []), *([f"turn {turn + 1}"] if num_turns > 1 else [])]
    return " · ".join(parts)


def _page_answer(name: str, contender: Contender, answer: Answer, reference: str | None) -> PageAnswer:
    return PageAnswer(
        model=contender.findings.subject.name,
        text=answer.text,
        rewards=tuple((one.judge, one.of(name, answer)) for one in contender.judged),
        is_right=is_correct(answer.text, reference) if name == "gsm8k" and reference is not None else None,
        was_cut=answer.finish_reason == "length",
    )
