"""A server with our public API whose answers a test writes beforehand, for the page to talk to over real HTTP.

It runs uvicorn in a thread, with the page mounted like in the product. A test lets text through piece by piece with
`release`, so nothing here or in a test has to sleep.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

WAIT_S = 20.0


@dataclass(frozen=True)
class Answer:
    """One answer of `/v1/chat/completions`. With `status` other than 200 nothing is streamed."""

    pieces: Sequence[str] = ()
    finish_reason: str | None = "stop"
    refusal: str | None = None  # why the rest is withheld
    status: int = 200
    error: dict[str, Any] | None = None  # with status 200: sent in the middle of the stream, after the pieces
    is_gated: bool = False  # each piece waits for `release`
    headers: dict[str, str] = field(default_factory=dict[str, str])


class ScriptedApi:
    def __init__(self) -> None:
        self.answers: deque[Answer] = deque()
        self.requests: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.readiness: dict[str, Any] | None = None  # None: ready
        self.hung_up = threading.Event()
        self.app = FastAPI(openapi_url=None)
        self.app.get("/v1/models")(self._models)
        self.app.post("/v1/chat/completions")(self._chat)
        self.app.get("/health/ready")(self._ready)
        self.loop: asyncio.AbstractEventLoop | None = None
        self._gate = asyncio.Semaphore(0)

    def forget(self) -> None:
        """As new, for the next test. A stream that still waits keeps the old gate, and nobody opens it."""
        self.answers.clear()
        self.requests.clear()
        self.authorizations.clear()
        self.readiness = None
        self.hung_up.clear()
        self._gate = asyncio.Semaphore(0)

    def release(self, num_pieces: int = 1) -> None:
        assert self.loop is not None
        for _ in range(num_pieces):
            self.loop.call_soon_threadsafe(self._gate.release)

    def will_answer(self, *pieces: str, **fields: Any) -> None:
        self.answers.append(Answer(pieces, **fields))

    def will_refuse(self, status: int, code: str, message: str = "no", **headers: str) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        self.answers.append(Answer(status=status, error=error, headers=headers))

    async def _models(self) -> Response:
        if self.readiness is not None:
            return JSONResponse({"error": {"message": "preparing", "code": "unavailable"}}, 503)
        return JSONResponse({"object": "list", "data": [{"id": "scripted-135m", "object": "model"}]})

    async def _ready(self) -> Response:
        return JSONResponse({"status": "ready"}) if self.readiness is None else JSONResponse(self.readiness, 503)

    async def _chat(self, request: Request) -> Response:
        self.loop = asyncio.get_running_loop()
        self.requests.append(await request.json())
        self.authorizations.append(request.headers.get("authorization"))
        answer = self.answers.popleft() if self.answers else Answer(("fine",))
        if answer.status != 200:
            return JSONResponse({"error": answer.error}, answer.status, headers=answer.headers)
        return StreamingResponse(self._stream(answer), media_type="text/event-stream")

    async def _stream(self, answer: Answer) -> AsyncGenerator[str, None]:
        gate = self._gate
        try:
            yield _chunk({"role": "assistant", "content": ""})
            for piece in answer.pieces:
                if answer.is_gated:
                    await gate.acquire()
                yield _chunk({"content": piece})
            if answer.error is not None:
                yield f"data: {json.dumps({'error': answer.error})}\n\n"
            else:
                yield _chunk({"refusal": answer.refusal} if answer.refusal else {}, answer.finish_reason)
                usage = {"prompt_tokens": 5, "completion_tokens": len(answer.pieces), "total_tokens": 9}
                yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.hung_up.set()
            raise


def _chunk(delta: dict[str, str], finish_reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "scripted-135m", "choices": [choice]}
    return f"data: {json.dumps(chunk)}\n\n"


class ServerThread:
    """uvicorn on a free loopback port, for as long as the `with` lasts."""

    def __init__(self, app: FastAPI, port: int) -> None:
        config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        async def serve() -> None:
            startup = self._server.startup

            async def startup_then_tell(sockets: list[socket.socket] | None = None) -> None:
                await startup(sockets)
                self._started.set()

            self._server.startup = startup_then_tell  # pyright: ignore[reportAttributeAccessIssue]
            await self._server.serve()

        asyncio.run(serve())

    def __enter__(self) -> ServerThread:
        self._thread.start()
        assert self._started.wait(WAIT_S), "the scripted server did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(WAIT_S)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
