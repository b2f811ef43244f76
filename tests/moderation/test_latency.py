from __future__ import annotations

import pytest

from moderation.latency import TOKEN, measure_latency, messages_of_length

pytestmark = pytest.mark.unit

TEXTS = ["One two, three.", "四五六七", "don't-stop", "", "eight nine ten eleven"]


@pytest.mark.parametrize("tokens", [1, 7, 64, 500])
def test_messages_have_exactly_the_tokens_asked_for(tokens: int) -> None:
    messages = messages_of_length(TEXTS, tokens, count=10)

    assert [len(TOKEN.findall(message)) for message in messages] == [tokens] * 10


def test_messages_differ_as_far_as_texts_do_and_are_the_same_again() -> None:
    messages = messages_of_length(TEXTS, 4, count=4)

    assert messages == messages_of_length(TEXTS, 4, count=4)
    assert messages[:2] == ["One two, three", "四五六七"]
    assert messages[3] == "eight nine ten eleven"  # the empty text begins none


def test_texts_without_a_word_are_refused_instead_of_looping_for_ever() -> None:
    with pytest.raises(ValueError, match="no text holds a token"):
        messages_of_length(["", "  "], 4, count=1)


def test_every_message_is_judged_by_itself_and_counted_once() -> None:
    seen: list[str] = []
    messages = ["a", "b", "c", "d"]

    latency = measure_latency(seen.append, messages, "letters", tokens=1)

    assert seen == [*messages[:3], *messages]  # the first three also warm up
    assert (latency.of, latency.messages, latency.tokens) == ("letters", 4, 1)
    assert 0.0 <= latency.p50_ms <= latency.p99_ms
