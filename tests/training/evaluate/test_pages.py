"""Pages show what was said as text, mark what was checked, and load nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from training.evaluate.pages import Page, PageAnswer, PageItem, index_html, page_html

pytestmark = pytest.mark.unit

HOSTILE = "<script>alert(1)</script><img src=\"https://example.org/x.png\" onerror='x'>&amp;"
ITEM = PageItem(
    title="81 · writing",
    question="Why?",
    answers=(
        PageAnswer("new", "Because.", (("judge", 0.5),), is_right=True),
        PageAnswer("old", "No idea.", (("judge", -1.25),), is_right=False, was_cut=True),
    ),
    reference="#### 4",
)
PAGE = Page("gsm8k.html", "GSM8K", "About it.", (ITEM,))


class Tags(HTMLParser):
    """Names of all tags, attributes that could load something, and whether each is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_whatever_was_written_stays_text() -> None:
    answers = (PageAnswer(HOSTILE, HOSTILE, ((HOSTILE, 1.0),)),)
    item = PageItem(HOSTILE, HOSTILE, answers, reference=HOSTILE)
    html = page_html(replace(PAGE, title=HOSTILE, about=HOSTILE, items=(item,)))
    tags = Tags(html)
    assert "script" not in tags.names
    assert "img" not in tags.names
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 9


@pytest.mark.parametrize("html", [page_html(PAGE), index_html("Answers", [PAGE])])
def test_a_page_is_well_formed_and_loads_nothing(html: str) -> None:
    tags = Tags(html)
    assert tags.open == []
    assert all(re.fullmatch(r"[a-z0-9_]+\.html", address) for address in tags.addresses)
    assert "default-src 'none'" in html
    assert "url(" not in html
    assert "@import" not in html


def test_a_page_keeps_to_light_or_dark() -> None:
    assert "color-scheme: light dark" in page_html(PAGE)


def test_scores_checks_and_the_winner_are_shown() -> None:
    html = page_html(PAGE)
    assert "judge +0.50" in html
    assert "judge -1.25" in html
    assert html.count("&#10003; right") == html.count("&#10007; wrong") == 1
    assert html.count("cut off at the limit") == 1
    assert re.search(r'<section class="answer won"><header><h3>new</h3>', html)


def test_nobody_wins_a_tie_or_without_a_judge() -> None:
    tied = replace(ITEM, answers=(PageAnswer("new", "a", (("j", 1.0),)), PageAnswer("old", "b", (("j", 1.0),))))
    unjudged = replace(ITEM, answers=(PageAnswer("new", "a"), PageAnswer("old", "b")))
    html = page_html(replace(PAGE, items=(tied, unjudged)))
    assert "answer won" not in html


def test_an_empty_answer_says_so() -> None:
    assert "<em>(no text)</em>" in page_html(replace(PAGE, items=(replace(ITEM, answers=(PageAnswer("new", " "),)),)))
