"""One request straight through ASGI, with a client that can hang up when the test says so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastapi import FastAPI
from starlette.types import Message


@dataclass(slots=True)
class HangingClient:
    """Sends one request and reads what comes until `hang_up`."""

    app: FastAPI
    messages: list[Message] = field(default_factory=list[Message])
    has_text: asyncio.Event = field(default_factory=asyncio.Event)
    has_ping: asyncio.Event = field(default_factory=asyncio.Event)
    _gone: asyncio.Event = field(default_factory=asyncio.Event)
    _body: bytes | None = None
    _task: asyncio.Task[None] | None = None

    def post(self, path: str, body: Mapping[str, object]) -> None:
        self._body = json.dumps(body).encode()
        headers = [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(self._body)).encode()),
        ]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "server": ("localhost", 80),
        }
        self._task = asyncio.create_task(self.app(scope, self._receive, self._send))

    async def hang_up(self) -> None:
        """Returns when the server has noticed."""
        self._gone.set()
        await self.end()

    async def end(self) -> None:
        assert self._task is not None
        await asyncio.wait_for(self._task, 5)

    @property
    def status(self) -> int:
        return self.messages[0]["status"]

    @property
    def content(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.messages.append(message)
        body = message.get("body", b"")
        if b'"content":"' in body and b'"content":""' not in body:
            self.has_text.set()
        if body.startswith(b":"):
            self.has_ping.set()
