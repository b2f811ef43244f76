"""Messages of a stated length, and how long one takes to judge. Used by the report and by benchmarks/moderation.py.

A token here is a word, a mark or one Chinese character: what a subword tokenizer makes at least one piece of.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np

from moderation.features import CJK

__all__ = ["Latency", "measure_latency", "messages_of_length"]

TOKEN = re.compile(rf"[{CJK}]|[^\W_{CJK}]+|[^\w\s]|_")


@dataclass(frozen=True, slots=True)
class Latency:
    """Of messages judged one after the other, each by itself. of: where their text was taken from."""

    of: str
    tokens: int
    messages: int
    p50_ms: float
    p99_ms: float


def messages_of_length(texts: Sequence[str], tokens: int, count: int) -> list[str]:
    """`count` messages of exactly `tokens` tokens, spread over `texts`: a text and those after it, cut at the end.

    The same arguments give the same messages. Raises ValueError if the texts hold no token.
    """
    usable = [(text, len(TOKEN.findall(text))) for text in texts if TOKEN.search(text)]
    if not usable:
        raise ValueError("no text holds a token; expected at least one word")
    return [_message_from(usable, i * len(usable) // count, tokens) for i in range(count)]


def measure_latency(judge: Callable[[str], object], messages: Sequence[str], of: str, tokens: int) -> Latency:
    """Milliseconds on the clock. The first messages are judged once before, so that nothing is loaded while timed."""
    for message in messages[:3]:
        judge(message)
    spent_ms = np.array([_milliseconds(judge, message) for message in messages])
    p50, p99 = np.quantile(spent_ms, [0.5, 0.99])
    return Latency(of, tokens, len(messages), round(float(p50), 3), round(float(p99), 3))


def _message_from(usable: Sequence[tuple[str, int]], start: int, tokens: int) -> str:
    parts: list[str] = []
    missing = tokens
    for text, length in islice(cycle(usable), start, None):
        parts.append(text)
        missing -= length
        if missing <= 0:
            break
    joined = " ".join(parts)
    last = next(islice(TOKEN.finditer(joined), tokens - 1, None))
    return joined[: last.end()]


def _milliseconds(judge: Callable[[str], object], message: str) -> float:
    began_s = time.perf_counter()
    judge(message)
    return 1000.0 * (time.perf_counter() - began_s)
