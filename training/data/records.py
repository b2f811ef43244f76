"""The four kinds of row, and the JSON object that each one is on a line of a file.

    conversation  {"messages": [{"role", "content"}, ...]}        at least a user's turn and an answer
    ranking       {"prompt": [messages], "chosen": str, "rejected": str}
                  {"prompt": [messages], "answers": [{"text": str, "rank": int}, ...]}    1 is best; ties are allowed
    prompt        {"prompt": [messages]}                          ends in a user's turn
    document      {"text": str}

Messages may begin with a system turn; then user and assistant take turns, the user first. Every row may have "source"
and "lang"; other keys are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import msgspec

from quant.model_directory import JsonValue
from serving.model.chat_format import ChatMessage

__all__ = [
    "MAX_ANSWERS",
    "UNKNOWN_SOURCE",
    "Conversation",
    "Document",
    "Prompt",
    "Ranking",
    "Row",
    "RowError",
    "decode_conversation",
    "decode_document",
    "decode_prompt",
    "decode_ranking",
    "encode_row",
]

UNKNOWN_SOURCE = "unknown"
# All pairs of a ranking are compared in one batch element; InstructGPT ranks 4 to 9 (arXiv:2203.02155, section 3.5).
MAX_ANSWERS = 32


class RowError(ValueError):
    """A line is not a row of the expected kind; the message says why."""


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: tuple[ChatMessage, ...]
    source: str
    lang: str


@dataclass(frozen=True, slots=True)
class Ranking:
    """answers: best first. ranks[i] is the rank of answers[i], 1 or more; equal ranks are a tie and prefer nothing."""

    prompt: tuple[ChatMessage, ...]
    answers: tuple[str, ...]
    ranks: tuple[int, ...]
    source: str

    @property
    def is_decided(self) -> bool:
        """Whether some answer is better than a different one."""
        return self.ranks[0] != self.ranks[-1] and len(set(self.answers)) == len(self.answers)


@dataclass(frozen=True, slots=True)
class Prompt:
    messages: tuple[ChatMessage, ...]
    source: str
    lang: str


@dataclass(frozen=True, slots=True)
class Document:
    text: str
    source: str
    lang: str


Row: TypeAlias = Conversation | Ranking | Prompt | Document


class _Message(msgspec.Struct):
    role: Literal["system", "user", "assistant"]
    content: str


class _ConversationLine(msgspec.Struct):
    messages: list[_Message]
    source: str = UNKNOWN_SOURCE
    lang: str = ""


class _Answer(msgspec.Struct):
    text: str
    rank: int


class _RankingLine(msgspec.Struct):
    prompt: list[_Message]
    chosen: str | None = None
    rejected: str | None = None
    answers: list[_Answer] | None = None
    source: str = UNKNOWN_SOURCE


class _PromptLine(msgspec.Struct):
    prompt: list[_Message]
    source: str = UNKNOWN_SOURCE
    lang: str = ""


class _DocumentLine(msgspec.Struct):
    text: str
    source: str = UNKNOWN_SOURCE
    lang: str = ""


_CONVERSATION = msgspec.json.Decoder(_ConversationLine)
_RANKING = msgspec.json.Decoder(_RankingLine)
_PROMPT = msgspec.json.Decoder(_PromptLine)
_DOCUMENT = msgspec.json.Decoder(_DocumentLine)


def decode_conversation(line: bytes) -> Conversation:
    """This and its siblings raise RowError, msgspec.MsgspecError or UnicodeDecodeError for another line."""
    row = _CONVERSATION.decode(line)
    return Conversation(_turns(row.messages, "messages", last="assistant"), row.source, row.lang)


def decode_ranking(line: bytes) -> Ranking:
    row = _RANKING.decode(line)
    prompt = _turns(row.prompt, "prompt", last="user")
    answers = _ranked_answers(row)
    for answer in answers:
        if not answer.text.strip():
            raise RowError("an answer is empty")
        if answer.rank < 1:
            raise RowError(f"rank {answer.rank} is below 1, the rank of the best answer")
    answers.sort(key=lambda answer: answer.rank)
    texts, ranks = tuple(answer.text for answer in answers), tuple(answer.rank for answer in answers)
    return Ranking(prompt, texts, ranks, row.source)


def decode_prompt(line: bytes) -> Prompt:
    row = _PROMPT.decode(line)
    return Prompt(_turns(row.prompt, "prompt", last="user"), row.source, row.lang)


def decode_document(line: bytes) -> Document:
    row = _DOCUMENT.decode(line)
    if not row.text.strip():
        raise RowError("text is empty")
    return Document(row.text, row.source, row.lang)


def encode_row(row: Row) -> bytes:
    """One line without its end, which the decoder of its kind reads back as the same row."""
    match row:
        case Conversation():
            fields: dict[str, JsonValue] = {"messages": _messages(row.messages), "lang": row.lang}
        case Ranking():
            answers = [{"text": text, "rank": rank} for text, rank in zip(row.answers, row.ranks, strict=True)]
            fields = {"prompt": _messages(row.prompt), "answers": answers}
        case Prompt():
            fields = {"prompt": _messages(row.messages), "lang": row.lang}
        case Document():
            fields = {"text": row.text, "lang": row.lang}
    return msgspec.json.encode({**fields, "source": row.source})


def _messages(messages: Sequence[ChatMessage]) -> list[JsonValue]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _turns(messages: Sequence[_Message], key: str, *, last: Literal["user", "assistant"]) -> tuple[ChatMessage, ...]:
    """Checked against what a chat template expects: system?, then user and assistant in turn, ending with `last`."""
    for index, message in enumerate(messages):
        if not message.content.strip():
            raise RowError(f"{key}[{index}] is empty")
    start = 1 if messages and messages[0].role == "system" else 0
    for index, message in enumerate(messages[start:]):
        expected = ("user", "assistant")[index % 2]
        if message.role != expected:
            raise RowError(f"{key}[{start + index}] is a turn of role {message.role!r}; expected {expected!r}")
    if not messages[start:] or messages[-1].role != last:
        found = f"ends with role {messages[-1].role!r}" if messages else "is empty"
        raise RowError(f"{key} {found}; expected the last turn to be of role {last!r}")
    return tuple(ChatMessage(message.role, message.content) for message in messages)


def _ranked_answers(row: _RankingLine) -> list[_Answer]:
    if row.answers is None:
        if row.chosen is None or row.rejected is None:
            raise RowError("there is neither `answers` nor both `chosen` and `rejected`")
        return [_Answer(row.chosen, 1), _Answer(row.rejected, 2)]
    if row.chosen is not None or row.rejected is not None:
        raise RowError("there are `answers` and `chosen` or `rejected`; expected one or the other")
    if not 2 <= len(row.answers) <= MAX_ANSWERS:
        raise RowError(f"there are {len(row.answers)} answers; expected 2 to {MAX_ANSWERS}")
    return row.answers
