"""How well a model predicts text it did not write: loss of passages of plain text, and of assistants' turns.

Texts are cut into passages before any tokenizer sees them, so two models are measured on the same characters. A passage
is scored by itself: the figure is higher than one from long windows, and the same way for both models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quant.progress import ProgressSink
from serving.model.chat_format import ChatFormatError
from training.data.records import Conversation
from training.evaluate.intervals import Measure, ratio_measure
from training.evaluate.player import Player

__all__ = [
    "Loss",
    "bits_per_byte",
    "conversation_losses",
    "increase_percent",
    "passage_losses",
    "perplexity",
    "split_passages",
]


@dataclass(frozen=True, slots=True)
class Loss:
    """Of one passage or conversation: negative log-likelihood over `tokens` predicted ids, `num_bytes` of text."""

    nats: float
    tokens: int
    num_bytes: int


def split_passages(text: str, max_bytes: int) -> list[str]:
    """Pieces of whole lines of at most `max_bytes` UTF-8 bytes; a longer line is cut at a space, or within a word."""
    passages: list[str] = []
    current = ""
    for line in text.splitlines(keepends=True):
        for piece in _cut_line(line, max_bytes):
            if current and _size(current) + _size(piece) > max_bytes:
                passages.append(current)
                current = ""
            current += piece
    return [passage.strip() for passage in [*passages, current] if passage.strip()]


def passage_losses(player: Player, passages: Sequence[str], progress: ProgressSink, stage: str) -> list[Loss | None]:
    """None for a passage of fewer than 2 ids, or of more than the context takes."""
    encoded = [player.tokenizer.encode_prompt(passage) for passage in passages]
    usable = [2 <= len(ids) <= player.max_context for ids in encoded]
    scored = iter(player.logprobs([ids for ids, ok in zip(encoded, usable, strict=True) if ok], progress, stage))
    losses: list[Loss | None] = []
    for passage, ok in zip(passages, usable, strict=True):
        values = next(scored) if ok else None
        losses.append(None if values is None else Loss(-math.fsum(values), len(values), _size(passage)))
    return losses


def conversation_losses(
    player: Player, conversations: Sequence[Conversation], progress: ProgressSink, stage: str
) -> list[Loss | None]:
    """Over the assistant's tokens, end of turn included. None where the chat format or the context cannot hold it."""
    rendered = [_render(player, conversation) for conversation in conversations]
    scored = iter(player.logprobs([one[0] for one in rendered if one is not None], progress, stage))
    losses: list[Loss | None] = []
    for conversation, one in zip(conversations, rendered, strict=True):
        if one is None:
            losses.append(None)
            continue
        # The score of the id at position i + 1 stands at i.
        targets = [value for value, is_answer in zip(next(scored), one[1][1:], strict=True) if is_answer]
        answers = [message.content for message in conversation.messages if message.role == "assistant"]
        losses.append(Loss(-math.fsum(targets), len(targets), sum(map(_size, answers))))
    return losses


def perplexity(losses: Sequence[Loss], *, seed: int) -> Measure:
    """Per token of this model's tokenizer: comparable between models of one tokenizer only."""
    nats = ratio_measure([loss.nats for loss in losses], [loss.tokens for loss in losses], seed=seed)
    return _map(nats, math.exp)


def bits_per_byte(losses: Sequence[Loss], *, seed: int) -> Measure:
    """Comparable between any two models."""
    nats = ratio_measure([loss.nats for loss in losses], [loss.num_bytes for loss in losses], seed=seed)
    return _map(nats, lambda value: value / math.log(2))


def increase_percent(new: Sequence[Loss], old: Sequence[Loss], *, seed: int) -> Measure:
    """By how much perplexity rose, per token of the old model, on the same texts: exact also if tokenizers differ."""
    differences = [after.nats - before.nats for after, before in zip(new, old, strict=True)]
    nats = ratio_measure(differences, [loss.tokens for loss in old], seed=seed)
    return _map(nats, lambda value: 100 * math.expm1(value))


def _render(player: Player, conversation: Conversation) -> tuple[list[int], list[bool]] | None:
    try:
        ids, is_answer = player.chat().render_with_loss_mask(conversation.messages)
    except ChatFormatError:
        return None
    return (ids, is_answer) if 2 <= len(ids) <= player.max_context and any(is_answer[1:]) else None


def _map(measure: Measure, function: Callable[[float], float]) -> Measure:
    low = None if measure.low is None else function(measure.low)
    high = None if measure.high is None else function(measure.high)
    return Measure(function(measure.value), low, high, measure.count)


def _size(text: str) -> int:
    return len(text.encode())


def _cut_line(line: str, max_bytes: int) -> list[str]:
    pieces: list[str] = []
    while _size(line) > max_bytes:
        # Cutting bytes and dropping a broken last character keeps whole characters.
        head = line.encode()[:max_bytes].decode(errors="ignore")
        space = head.rfind(" ")
        head = head[: space + 1] if space > 0 else head
        pieces.append(head)
        line = line[len(head) :]
    return [*pieces, line]
