"""Server-sent events as OpenAI's clients read them: chunks, exactly one end, `[DONE]`; every line ends in LF.

A chunk is two fixed byte strings around an encoded text: at 32 streams the shape of a chunk must not cost anything.
The response owns the end of its request: however it ends, `on_end` runs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import anyio
import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from serving.errors import ServiceError
from serving.gateway.choices import ChoiceDelta
from serving.gateway.error_responses import error_body
from serving.gateway.fields import JsonObject
from serving.gateway.generation import Usage

DONE = b"data: [DONE]\n\n"
_SHUTDOWN_GRACE_S = 1.0

LogprobsOf = Callable[[ChoiceDelta], JsonObject]


def event(body: JsonObject) -> bytes:
    # JSON escapes line breaks inside strings, so one event is one data line.
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def error_event(error: ServiceError) -> bytes:
    return event(error_body(error))


def usage_json(usage: Usage) -> JsonObject:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class ChunkWriter:
    """The chunks of one streamed answer. `logprobs_of` None: no log-probabilities were asked for."""

    def __init__(
        self,
        head: JsonObject,
        *,
        is_chat: bool,
        includes_usage: bool,
        logprobs_of: LogprobsOf | None = None,
    ) -> None:
        self._head = head
        self._is_chat = is_chat
        self._includes_usage = includes_usage
        self._logprobs_of = logprobs_of
        encoded_head = msgspec.json.encode(head)[:-1]  # without the closing brace
        self._start = b"data: " + encoded_head + b',"choices":[{"index":'
        self._text_key = b',"delta":{"content":' if is_chat else b',"text":'
        self._text_end = b"}" if is_chat else b""
        self._end = b'}],"usage":null}\n\n' if includes_usage else b"}]}\n\n"

    def role(self, index: int) -> bytes:
        """The first chunk of a chat choice."""
        delta = b',"delta":{"role":"assistant","content":"","refusal":null}'
        return self._chunk(index, delta, b"null", b"null")

    def delta(self, delta: ChoiceDelta) -> bytes:
        """The text, and for chat the finish reason in a chunk of its own, with the reason of a withheld rest."""
        finish = b"null" if delta.finish_reason is None else msgspec.json.encode(delta.finish_reason)
        if not self._is_chat:
            return self._text(delta, finish)
        text = self._text(delta, b"null") if delta.text or delta.logprobs else b""
        if delta.finish_reason is None:
            return text
        refusal = b"" if delta.refusal is None else b'"refusal":' + msgspec.json.encode(delta.refusal)
        return text + self._chunk(delta.index, b',"delta":{' + refusal + b"}", b"null", finish)

    def usage(self, usage: Usage) -> bytes:
        return event({**self._head, "choices": [], "usage": usage_json(usage)}) if self._includes_usage else b""

    def _text(self, delta: ChoiceDelta, finish: bytes) -> bytes:
        body = self._text_key + msgspec.json.encode(delta.text) + self._text_end
        logprobs = b"null" if self._logprobs_of is None else msgspec.json.encode(self._logprobs_of(delta))
        return self._chunk(delta.index, body, logprobs, finish)

    def _chunk(self, index: int, body: bytes, logprobs: bytes, finish: bytes) -> bytes:
        return b"".join(
            (self._start, b"%d" % index, body, b',"logprobs":', logprobs, b',"finish_reason":', finish, self._end)
        )


class EventStreamResponse(EventSourceResponse):
    """Sends ready-made event bytes with LF and comment pings.

    `on_end` runs once whatever happened: sent to the end, client gone before or during the first chunk, shutdown.
    `on_shutdown` is called when the server starts to stop; the stream then has a moment to end with an error event.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        ping_interval_s: float,
        on_end: Callable[[], None],
        on_shutdown: Callable[[], None],
    ) -> None:
        self._on_end = on_end
        self._on_shutdown = on_shutdown
        self._is_shutting_down = anyio.Event()
        super().__init__(
            events,
            sep="\n",
            ping=ping_interval_s,
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
            headers={"Cache-Control": "no-store"},
            shutdown_event=self._is_shutting_down,
            shutdown_grace_period=_SHUTDOWN_GRACE_S,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watching = asyncio.create_task(self._watch_shutdown())
        try:
            await super().__call__(scope, receive, send)
        finally:
            watching.cancel()
            self._on_end()
            with contextlib.suppress(asyncio.CancelledError):
                await watching

    async def _watch_shutdown(self) -> None:
        await self._is_shutting_down.wait()
        self._on_shutdown()
