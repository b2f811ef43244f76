"""Conversations as the page keeps them: turns, and how they go to and from the browser's storage.

A turn is a prompt with its answer, so a refused or failed turn can be left out of what is sent next as a whole.
What comes back from a browser is anybody's JSON: whatever does not fit is dropped, never trusted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, cast

from ui.client import ChatMessage

__all__ = [
    "Conversation",
    "History",
    "Turn",
    "TurnStats",
    "TurnStatus",
    "history_from_json",
    "history_to_json",
    "messages_to_send",
]

MAX_CONVERSATIONS = 100
# All chats go with each request of the page, whose bodies are capped; browsers keep about 5 MB for a site.
MAX_STORED_BYTES = 1_500_000
TITLE_LENGTH = 42


class TurnStatus(StrEnum):
    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped"  # the user pressed Stop
    CUT = "cut"  # reached the length limit
    REFUSED = "refused"  # moderation: never sent again
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class TurnStats:
    first_token_s: float
    tokens: int
    tokens_per_s: float | None  # None when there was only one token


@dataclass(frozen=True, slots=True)
class Turn:
    prompt: str
    answer: str = ""
    status: TurnStatus = TurnStatus.RUNNING
    notice: str = ""  # why it was refused or failed, in a sentence for the user
    stats: TurnStats | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    id: str
    turns: tuple[Turn, ...] = ()

    @property
    def title(self) -> str:
        if not self.turns:
            return "New chat"
        first_line = " ".join(self.turns[0].prompt.split())
        return first_line if len(first_line) <= TITLE_LENGTH else first_line[: TITLE_LENGTH - 1].rstrip() + "…"


@dataclass(frozen=True, slots=True)
class History:
    """Newest conversation first. `current_id` may name none of them: a new chat that has no turn yet."""

    conversations: tuple[Conversation, ...]
    current_id: str

    @property
    def current(self) -> Conversation:
        for conversation in self.conversations:
            if conversation.id == self.current_id:
                return conversation
        return Conversation(self.current_id)

    def with_conversation(self, conversation: Conversation) -> History:
        """Puts it on top and makes it current."""
        others = tuple(other for other in self.conversations if other.id != conversation.id)
        return History((conversation, *others)[:MAX_CONVERSATIONS], conversation.id)

    def without(self, conversation_id: str, *, next_id: str) -> History:
        return History(tuple(c for c in self.conversations if c.id != conversation_id), next_id)

    def opened(self, conversation_id: str) -> History:
        return replace(self, current_id=conversation_id)


def messages_to_send(system_prompt: str, turns: Sequence[Turn], prompt: str) -> list[ChatMessage]:
    """The conversation as the model should see it: only turns that have an answer and were not refused."""
    messages = [ChatMessage("system", system_prompt.strip())] if system_prompt.strip() else []
    for turn in turns:
        if turn.answer and turn.status is not TurnStatus.REFUSED:
            messages += [ChatMessage("user", turn.prompt), ChatMessage("assistant", turn.answer)]
    return [*messages, ChatMessage("user", prompt)]


def history_to_json(history: History) -> dict[str, object]:
    """The oldest conversations go once there is more than a browser should keep; the newest always stays."""
    kept: list[dict[str, object]] = []
    num_bytes = 0
    for conversation in history.conversations:
        num_bytes += sum(_stored_bytes(turn) for turn in conversation.turns)
        if kept and num_bytes > MAX_STORED_BYTES:
            break
        kept.append({"id": conversation.id, "turns": [_turn_to_json(turn) for turn in conversation.turns]})
    return {"version": 1, "current": history.current_id, "conversations": kept}


def history_from_json(value: object, *, new_id: str) -> History:
    """`new_id` names the current conversation when the stored value names none."""
    fields = _mapping(value)
    conversations: list[Conversation] = []
    for item in _items(fields.get("conversations"))[:MAX_CONVERSATIONS]:
        conversation = _mapping(item)
        identifier = conversation.get("id")
        turns = tuple(turn for turn in map(_turn_from_json, _items(conversation.get("turns"))) if turn is not None)
        if isinstance(identifier, str) and identifier and turns:
            conversations.append(Conversation(identifier, turns))
    current = fields.get("current")
    return History(tuple(conversations), current if isinstance(current, str) and current else new_id)


def _stored_bytes(turn: Turn) -> int:
    return len(f"{turn.prompt}{turn.answer}{turn.notice}".encode(errors="replace")) + 100


def _turn_to_json(turn: Turn) -> dict[str, object]:
    stats = turn.stats
    return {
        "prompt": turn.prompt,
        "answer": turn.answer,
        "status": turn.status.value,
        "notice": turn.notice,
        "stats": None if stats is None else [stats.first_token_s, stats.tokens, stats.tokens_per_s],
    }


def _turn_from_json(value: object) -> Turn | None:
    fields = _mapping(value)
    prompt, answer, notice = fields.get("prompt"), fields.get("answer"), fields.get("notice")
    if not isinstance(prompt, str) or not isinstance(answer, str):
        return None
    try:
        status = TurnStatus(str(fields.get("status")))
    except ValueError:
        return None
    # A turn that was running when the page went away will not go on.
    if status is TurnStatus.RUNNING:
        status = TurnStatus.STOPPED
    stats = _stats_from_json(fields.get("stats"))
    return Turn(prompt, answer, status, notice if isinstance(notice, str) else "", stats)


def _stats_from_json(value: object) -> TurnStats | None:
    match value:
        case [int() | float() as first_token_s, int() as tokens, (int() | float() | None) as rate]:
            numbers = [first_token_s, tokens, rate or 0]
            if all(math.isfinite(number) for number in numbers):
                return TurnStats(float(first_token_s), tokens, rate)
        case _:
            pass
    return None


def _mapping(value: object) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, dict) else {}


def _items(value: object) -> list[object]:
    return cast("list[object]", value) if isinstance(value, list) else []
