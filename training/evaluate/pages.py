"""Answers side by side, to read: static pages that load nothing, show text as text, and keep to light or dark.

Everything that a model or a data file wrote is escaped; a content security policy forbids scripts and requests besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Page", "PageAnswer", "PageItem", "index_html", "page_html"]

_STYLE = """
:root { color-scheme: light dark; --edge: #8886; --soft: #8881; --good: #1a7f37; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --good: #4ac26b; --bad: #ff7b72; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 90rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 0 0 .5rem; } h3 { font-size: .9rem; margin: 0; }
article { border-top: 1px solid var(--edge); padding: 1.2rem 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.question { border-left: 3px solid var(--edge); padding-left: .8rem; margin-bottom: .8rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
.answer { background: var(--soft); border: 1px solid var(--edge); border-radius: .5rem; padding: .8rem; }
.answer header { display: flex; flex-wrap: wrap; gap: .3rem .8rem; align-items: baseline; margin-bottom: .5rem; }
.note { font-size: .85rem; opacity: .8; } .good { color: var(--good); } .bad { color: var(--bad); }
.won h3::after { content: " \\2605"; } details { margin-top: .6rem; } nav { font-size: .9rem; margin-bottom: 1rem; }
"""
_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
"""


@dataclass(frozen=True, slots=True)
class PageAnswer:
    """rewards: (judge, score). is_right: None where nothing can be checked."""

    model: str
    text: str
    rewards: tuple[tuple[str, float], ...] = ()
    is_right: bool | None = None
    was_cut: bool = False


@dataclass(frozen=True, slots=True)
class PageItem:
    """One question of one turn, and each model's answer to it."""

    title: str
    question: str
    answers: tuple[PageAnswer, ...]
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """file_name: of the page itself, for the index."""

    file_name: str
    title: str
    about: str
    items: tuple[PageItem, ...]


def page_html(page: Page) -> str:
    items = "".join(_item_html(item) for item in page.items)
    return (
        _HEAD.format(title=escape(page.title), style=_STYLE)
        + f'<nav><a href="index.html">All pages</a></nav>\n<h1>{escape(page.title)}</h1>\n'
        + f'<p class="note">{escape(page.about)}</p>\n<main>\n{items}</main>\n</html>\n'
    )


def index_html(title: str, pages: Sequence[Page]) -> str:
    rows = "".join(
        f'<li><a href="{escape(page.file_name)}">{escape(page.title)}</a> '
        f'<span class="note">{len(page.items)} answers a model</span></li>\n'
        for page in pages
    )
    return _HEAD.format(title=escape(title), style=_STYLE) + f"<h1>{escape(title)}</h1>\n<ul>\n{rows}</ul>\n</html>\n"


def _item_html(item: PageItem) -> str:
    best = _winner(item.answers)
    answers = "".join(_answer_html(answer, is_best=index == best) for index, answer in enumerate(item.answers))
    reference = ""
    if item.reference is not None:
        reference = f'<details><summary>Reference</summary><p class="text">{escape(item.reference)}</p></details>\n'
    return (
        f"<article>\n<h2>{escape(item.title)}</h2>\n"
        f'<p class="text question">{escape(item.question)}</p>\n'
        f'<div class="answers">\n{answers}</div>\n{reference}</article>\n'
    )


def _answer_html(answer: PageAnswer, *, is_best: bool) -> str:
    notes = [f'<span class="note">{escape(judge)} {score:+.2f}</span>' for judge, score in answer.rewards]
    if answer.is_right is not None:
        kind, word = ("good", "&#10003; right") if answer.is_right else ("bad", "&#10007; wrong")
        notes.append(f'<span class="note {kind}">{word}</span>')
    if answer.was_cut:
        notes.append('<span class="note">cut off at the limit</span>')
    text = escape(answer.text) if answer.text.strip() else "<em>(no text)</em>"
    return (
        f'<section class="answer{" won" if is_best else ""}"><header><h3>{escape(answer.model)}</h3>{"".join(notes)}'
        f'</header><p class="text">{text}</p></section>\n'
    )


def _winner(answers: Sequence[PageAnswer]) -> int | None:
    """By the first judge; None for one answer, for none judged, and for a tie."""
    scores = [answer.rewards[0][1] for answer in answers if answer.rewards]
    if len(scores) < 2 or len(scores) != len(answers) or scores.count(max(scores)) > 1:
        return None
    return scores.index(max(scores))
