"""A streaming load on any OpenAI-compatible chat endpoint, and what its clients see of it.

Speaks HTTP/1.1 by hand: the client shares the machine with the server it measures, so it must cost little.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from urllib.parse import urlsplit

# Different openings, so that no server gains from a cached prefix beyond the chat template's.
TOPICS = (
    "a lighthouse keeper", "the history of bread", "a walk in the mountains", "how rivers shape valleys",
    "a violin maker", "the first railways", "an old library", "bees and their hives", "a night train",
    "the invention of paper", "a small harbour", "why leaves turn red", "a clockmaker", "deep sea fish",
    "a village market", "the silk road", "a snowy owl", "the moons of Jupiter", "a potter", "desert plants",
    "a chess player", "the tides", "a mountain hut", "early telescopes", "a ferry crossing", "volcanoes",
    "a bookbinder", "migrating birds", "a winter garden", "the compass", "a stone bridge", "glaciers",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Load:
    base_url: str  # with /v1
    model: str
    num_streams: int
    max_tokens: int = 128
    prompt_words: int = 0  # extra words in front of the question, for long prompts
    ignore_eos: bool = False  # an extension that we and llama.cpp take: every answer has max_tokens tokens
    api_key: str | None = None


@dataclass(frozen=True, slots=True)
class StreamResult:
    """One client's view. Times in seconds."""

    start: float
    first_token: float
    end: float
    gaps: list[float]  # between chunks that carried text
    num_tokens: int  # as the server counts them
    text: str


@dataclass(frozen=True, slots=True)
class LoadResult:
    num_streams: int
    num_tokens: int
    tokens_per_s: float  # all streams, first request sent to last token
    decode_tokens_per_s: float  # all streams, without the time to the first token
    ttft_p50_s: float
    ttft_max_s: float
    gap_p50_s: float
    gap_p99_s: float


async def run_load(load: Load, *, round_index: int = 0) -> LoadResult:
    """Start all streams at once, wait for every one to end. Raises RuntimeError on an answer that is not a stream."""
    results = await asyncio.gather(*(_stream(load, i + 100 * round_index) for i in range(load.num_streams)))
    start, end = min(r.start for r in results), max(r.end for r in results)
    first = [r.first_token - r.start for r in results]
    gaps = sorted(gap for r in results for gap in r.gaps) or [0.0]
    num_tokens = sum(r.num_tokens for r in results)
    decode_s = end - min(r.first_token for r in results)
    return LoadResult(
        num_streams=load.num_streams,
        num_tokens=num_tokens,
        tokens_per_s=num_tokens / (end - start),
        decode_tokens_per_s=(num_tokens - load.num_streams) / max(decode_s, 1e-9),
        ttft_p50_s=median(first),
        ttft_max_s=max(first),
        gap_p50_s=median(gaps),
        gap_p99_s=gaps[min(len(gaps) - 1, int(len(gaps) * 0.99))],
    )


async def _stream(load: Load, index: int) -> StreamResult:
    return await send(load.base_url, _chat(load, index), load.api_key)


async def send(base_url: str, chat: Mapping[str, object], api_key: str | None = None) -> StreamResult:
    """One chat completion, streamed whatever `chat` says. Raises RuntimeError on an answer that is not a stream."""
    url = urlsplit(base_url)
    host, port = url.hostname or "127.0.0.1", url.port or 80
    reader, writer = await asyncio.open_connection(host, port)
    try:
        start = time.perf_counter()
        writer.write(_request(chat, f"{host}:{port}", url.path, api_key))
        await writer.drain()
        status = await reader.readline()
        if b" 200 " not in status:
            body = await asyncio.wait_for(reader.read(4096), 5)
            raise RuntimeError(f"{base_url} answered {status.decode().strip()}: {body[-600:].decode(errors='replace')}")
        return await _read_stream(reader, start)
    finally:
        writer.close()


def _chat(load: Load, index: int) -> dict[str, object]:
    topic = TOPICS[index % len(TOPICS)]
    padding = " ".join(f"{topic.split()[-1]} {index}-{i}" for i in range(load.prompt_words // 2))
    question = f"Request {index}: tell me a long and detailed story about {topic}."
    body: dict[str, object] = {
        "model": load.model,
        "messages": [{"role": "user", "content": f"{padding}\n{question}" if padding else question}],
        "max_tokens": load.max_tokens,
        "temperature": 0,
    }
    if load.ignore_eos:
        body["ignore_eos"] = True
    return body


def _request(chat: Mapping[str, object], host: str, path: str, api_key: str | None) -> bytes:
    data = json.dumps({**chat, "stream": True, "stream_options": {"include_usage": True}}).encode()
    key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
    head = f"POST {path}/chat/completions HTTP/1.1\r\nHost: {host}\r\n{key}Content-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data


async def _read_stream(reader: asyncio.StreamReader, start: float) -> StreamResult:
    """Chunk sizes of the transfer coding stand on lines of their own and are passed over."""
    times: list[float] = []
    parts: list[str] = []
    num_tokens = 0
    while line := await reader.readline():
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            break
        event = json.loads(line[6:])
        if "error" in event:
            raise RuntimeError(f"the stream ended in an error: {event['error']}")
        if event.get("usage"):
            num_tokens = event["usage"]["completion_tokens"]
        choices = event.get("choices") or [{}]
        if part := (choices[0].get("delta") or {}).get("content"):
            times.append(time.perf_counter())
            parts.append(part)
    if not times:
        raise RuntimeError("the stream carried no text")
    gaps = [later - earlier for earlier, later in pairwise(times)]
    return StreamResult(start, times[0], times[-1], gaps, num_tokens or len(times), "".join(parts))
