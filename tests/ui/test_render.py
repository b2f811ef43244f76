"""Markdown made safe, figures and notices. That nothing runs in a browser is shown in test_page."""

from __future__ import annotations

import pytest

from ui.client import Readiness
from ui.conversation import Turn, TurnStats, TurnStatus
from ui.render import (
    chatbot_messages,
    plain_prompt,
    progress_panel,
    safe_markdown,
    stats_line,
    status_pill,
    turn_index_of,
)

pytestmark = pytest.mark.unit

ZWSP = "\u200b"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("1 < 2 and <b>x</b>", f"1 <{ZWSP} 2 and <{ZWSP}b>x<{ZWSP}/b>"),
        ("code `a < b` and a < b", f"code `a < b` and a <{ZWSP} b"),
        ("``x ` <b> `` <i>", f"``x ` <b> `` <{ZWSP}i>"),
        ("`unclosed <b>", f"`unclosed <{ZWSP}b>"),
        ("![alt](https://x.example/y.png)", "[alt](https://x.example/y.png)"),
        ("```html\n<b>\n```\n<b>", f"```html\n<b>\n```\n<{ZWSP}b>"),
        ("~~~\n```\n<b>\n~~~\n<b>", f"~~~\n```\n<b>\n~~~\n<{ZWSP}b>"),
        ("````\n```\n<b>\n````", "````\n```\n<b>\n````"),
        ("```python\nprint(1 < 2)", "```python\nprint(1 < 2)\n```"),
        ('```mermaid\nA["<img>"]\n```', '```\nA["<img>"]\n```'),
        ('```html" onload="x\n<b>\n```', "```html\n<b>\n```"),
        ("    indented", "    indented"),
        ("你好 🌱", "你好 🌱"),
    ],
)
def test_tags_open_only_in_code_and_pictures_become_links(text: str, shown: str) -> None:
    assert safe_markdown(text) == shown


def test_an_edited_prompt_is_what_was_typed() -> None:
    typed = "if a <b> then `c < d`\n\n```\n<e>\n```"
    assert plain_prompt(safe_markdown(typed)) == typed


def test_figures_of_an_answer() -> None:
    turn = Turn("p", "a", TurnStatus.DONE, stats=TurnStats(0.0834, 1234, 41.25))
    assert stats_line(turn) == "first token 83 ms · 41.2 tokens/s · 1,234 tokens"


def test_a_single_token_has_no_rate() -> None:
    assert stats_line(Turn("p", "a", TurnStatus.CUT, stats=TurnStats(1.5, 1, None))) == (
        "first token 1.5 s · 1 token · reached the length limit"
    )


def test_each_turn_is_two_messages_so_that_an_index_finds_it() -> None:
    turns = [Turn("a", "b", TurnStatus.DONE), Turn("c", status=TurnStatus.REFUSED, notice="no"), Turn("d")]
    messages = chatbot_messages(turns)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3
    assert [turn_index_of(index) for index in range(6)] == [0, 0, 1, 1, 2, 2]
    assert all(message["content"] for message in messages)


def test_a_turn_stopped_before_its_first_token_still_has_something_to_show() -> None:
    (_, answer) = chatbot_messages([Turn("a", status=TurnStatus.STOPPED)])
    assert "stopped" in str(answer["content"])


def test_notices_and_stages_are_text() -> None:
    hostile = "<img src=x onerror=alert(1)>"
    turn = Turn("p", status=TurnStatus.FAILED, notice=hostile)
    assert "<img" not in str(chatbot_messages([turn])[1])
    assert "<img" not in progress_panel(Readiness(ready=False, stage=hostile))
    assert "<img" not in progress_panel(Readiness(ready=False, error=hostile))
    assert "<img" not in status_pill(hostile, Readiness(ready=True))


def test_progress_shows_the_share_when_it_is_known() -> None:
    panel = progress_panel(Readiness(ready=False, stage="Downloading", done=30, total=120))
    assert 'aria-valuenow="25"' in panel
    assert "width:25.0%" in panel


@pytest.mark.parametrize("total", [None, 0, 1])
def test_progress_of_one_step_has_no_share(total: float | None) -> None:
    panel = progress_panel(Readiness(ready=False, stage="Converting", total=total))
    assert "aria-valuenow" not in panel
    assert "unknown" in panel


def test_the_pill_tells_ready_starting_and_gone_apart() -> None:
    assert "ready" in status_pill("m", Readiness(ready=True))
    assert "getting ready" in status_pill("m", Readiness(ready=False))
    assert "not reachable" in status_pill("m", None)
