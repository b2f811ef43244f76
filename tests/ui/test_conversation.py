"""What is sent with the next message, and what survives the browser's storage."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ui.client import ChatMessage
from ui.conversation import (
    MAX_STORED_BYTES,
    Conversation,
    History,
    Turn,
    TurnStats,
    TurnStatus,
    history_from_json,
    history_to_json,
    messages_to_send,
)

pytestmark = pytest.mark.unit

DONE = Turn("Hi", "Hello!", TurnStatus.DONE, stats=TurnStats(0.05, 3, 41.5))
REFUSED = Turn("something harmful", "", TurnStatus.REFUSED, "no")
FAILED = Turn("again", "", TurnStatus.FAILED, "busy")
STOPPED = Turn("Count", "one two", TurnStatus.STOPPED)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def test_refused_and_unanswered_turns_are_left_out_as_a_whole() -> None:
    assert messages_to_send("", [DONE, REFUSED, FAILED, STOPPED], "next") == [
        ChatMessage("user", "Hi"),
        ChatMessage("assistant", "Hello!"),
        ChatMessage("user", "Count"),
        ChatMessage("assistant", "one two"),
        ChatMessage("user", "next"),
    ]


def test_a_refused_turn_is_left_out_even_if_it_has_text() -> None:
    assert messages_to_send("", [Turn("bad", "leaked", TurnStatus.REFUSED)], "next") == [ChatMessage("user", "next")]


def test_the_system_prompt_comes_first_and_an_empty_one_not_at_all() -> None:
    assert messages_to_send(" Be brief. ", [], "x")[0] == ChatMessage("system", "Be brief.")
    assert messages_to_send("  ", [], "x") == [ChatMessage("user", "x")]


def test_history_comes_back_as_it_was_stored() -> None:
    history = History((Conversation("a", (DONE, REFUSED)), Conversation("b", (STOPPED,))), "b")
    stored = json.loads(json.dumps(history_to_json(history)))
    assert history_from_json(stored, new_id="new") == history


def test_a_turn_that_was_running_comes_back_stopped() -> None:
    stored = history_to_json(History((Conversation("a", (Turn("Hi", "Hel"),)),), "a"))
    assert history_from_json(stored, new_id="new").current.turns[0].status is TurnStatus.STOPPED


@given(json_values)
def test_whatever_a_browser_sends_gives_a_history(value: Any) -> None:
    for stored in (value, {"conversations": value}, {"conversations": [{"id": "a", "turns": value}]}):
        history = history_from_json(stored, new_id="new")
        json.dumps(history_to_json(history))


@pytest.mark.parametrize("stats", [[1], ["a", 2, 3], [float("nan"), 2, 3], [1, 2.5, 3], "abc", {"a": 1}])
def test_figures_that_are_none_are_dropped(stats: object) -> None:
    turn = {"prompt": "p", "answer": "a", "status": "done", "notice": "", "stats": stats}
    history = history_from_json({"conversations": [{"id": "a", "turns": [turn]}], "current": "a"}, new_id="new")
    assert history.current.turns == (Turn("p", "a", TurnStatus.DONE),)


def test_the_newest_conversation_is_on_top_and_current() -> None:
    history = History((Conversation("a", (DONE,)), Conversation("b", (DONE,))), "a")
    changed = history.with_conversation(Conversation("b", (DONE, STOPPED)))
    assert [chat.id for chat in changed.conversations] == ["b", "a"]
    assert changed.current.turns == (DONE, STOPPED)


def test_oldest_conversations_go_when_storage_is_full_and_the_newest_never() -> None:
    big = Turn("x" * (MAX_STORED_BYTES // 2), "字", TurnStatus.DONE)
    history = History(tuple(Conversation(name, (big,)) for name in "abc"), "a")
    assert [chat.id for chat in history_from_json(history_to_json(history), new_id="n").conversations] == ["a"]


def test_a_title_is_the_start_of_the_first_prompt_on_one_line() -> None:
    assert Conversation("a", (Turn("  two\nlines  "),)).title == "two lines"
    long_title = Conversation("a", (Turn("word " * 40),)).title
    assert long_title.endswith("…")
    assert len(long_title) <= 42
