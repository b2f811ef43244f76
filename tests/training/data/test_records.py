from __future__ import annotations

import json
from collections.abc import Mapping

import msgspec
import pytest

from quant.model_directory import JsonValue
from serving.model.chat_format import ChatMessage
from tests.training.data.row_files import chat, document, pair, say
from training.data.records import (
    Conversation,
    Document,
    Prompt,
    Ranking,
    Row,
    RowError,
    decode_conversation,
    decode_document,
    decode_prompt,
    decode_ranking,
    encode_row,
)

pytestmark = pytest.mark.unit

HELLO = (ChatMessage("user", "Hello"),)
DECODERS = {
    Conversation: decode_conversation,
    Ranking: decode_ranking,
    Prompt: decode_prompt,
    Document: decode_document,
}


def line(row: Mapping[str, JsonValue]) -> bytes:
    return json.dumps(row).encode()


def test_conversation_is_read_with_its_system_turn() -> None:
    row = {"messages": [say("system", "Be brief."), say("user", "Hello"), say("assistant", "Hi")], "source": "ours"}
    messages = (ChatMessage("system", "Be brief."), *HELLO, ChatMessage("assistant", "Hi"))
    assert decode_conversation(line(row)) == Conversation(messages, "ours", "")


def test_pair_is_a_ranking_of_two() -> None:
    assert decode_ranking(line(pair("Hello", "Hi", "No"))) == Ranking(HELLO, ("Hi", "No"), (1, 2), "ours")


def test_ranked_answers_are_sorted_best_first_and_ties_keep_their_order() -> None:
    answers: list[JsonValue] = [{"text": text, "rank": rank} for text, rank in (("c", 3), ("a", 1), ("d", 3), ("b", 2))]
    ranking = decode_ranking(line({"prompt": [say("user", "Hello")], "answers": answers}))
    assert (ranking.answers, ranking.ranks) == (("a", "b", "c", "d"), (1, 2, 3, 3))


@pytest.mark.parametrize(
    ("answers", "ranks", "is_decided"),
    [(("a", "b"), (1, 2), True), (("a", "b"), (1, 1), False), (("a", "a"), (1, 2), False)],
)
def test_ranking_is_decided_only_where_one_answer_beats_a_different_one(
    answers: tuple[str, ...], ranks: tuple[int, ...], is_decided: bool
) -> None:
    assert Ranking(HELLO, answers, ranks, "ours").is_decided is is_decided


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"mesages": []}, "missing required field `messages`"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [say("user", "a")]}, "ends with role 'user'; expected the last turn to be of role 'assistant'"),
        ({"messages": [say("assistant", "a")]}, "role 'assistant'; expected 'user'"),
        ({"messages": [say("user", "a"), say("user", "b")]}, r"messages\[1\] is a turn of role 'user'"),
        ({"messages": [say("user", "a"), say("assistant", " \n")]}, r"messages\[1\] is empty"),
        ({"messages": [say("user", "a"), say("tool", "b")]}, r"'tool'.*messages\[1\].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "Expected `str`, got `int`"),
        ({"messages": [say("system", "a")]}, "ends with role 'system'"),
    ],
)
def test_broken_conversation_is_refused_with_the_reason(row: dict[str, JsonValue], reason: str) -> None:
    with pytest.raises((RowError, msgspec.MsgspecError), match=reason):
        decode_conversation(line(row))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "neither `answers` nor both"),
        ({"chosen": "a"}, "neither `answers` nor both"),
        ({"chosen": "a", "rejected": ""}, "an answer is empty"),
        ({"answers": [{"text": "a", "rank": 1}]}, "1 answers; expected 2 to 32"),
        ({"answers": [{"text": "a", "rank": 0}, {"text": "b", "rank": 1}]}, "rank 0 is below 1"),
        ({"answers": [{"text": "a", "rank": 1}] * 33}, "33 answers"),
        ({"answers": [{"text": "a", "rank": 1}] * 2, "chosen": "a"}, "one or the other"),
    ],
)
def test_broken_ranking_is_refused_with_the_reason(fields: dict[str, JsonValue], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        decode_ranking(line({"prompt": [say("user", "Hello")], **fields}))


def test_prompt_that_ends_with_an_answer_is_refused() -> None:
    with pytest.raises(RowError, match="expected the last turn to be of role 'user'"):
        decode_prompt(line({"prompt": [say("user", "a"), say("assistant", "b")]}))


def test_empty_document_is_refused() -> None:
    with pytest.raises(RowError, match="text is empty"):
        decode_document(line(document("  \n")))


def test_missing_source_is_called_unknown() -> None:
    assert decode_document(b'{"text": "a"}').source == "unknown"


@pytest.mark.parametrize(
    "row",
    [
        Conversation((*HELLO, ChatMessage("assistant", "Hi “there”\n")), "ours", "en"),
        Ranking(HELLO, ("a", "b", "c"), (1, 2, 2), "ours"),
        Prompt(HELLO, "ours", "zh"),
        Document("你好\u2028", "ours", "zh"),
    ],
    ids=lambda row: type(row).__name__,
)
def test_written_row_is_read_back(row: Row) -> None:
    assert DECODERS[type(row)](encode_row(row)) == row


def test_chat_of_the_test_files_is_a_conversation() -> None:
    assert decode_conversation(line(chat("Hello", "Hi"))).messages[1].content == "Hi"
