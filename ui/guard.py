"""What of Gradio the network may reach, and what a browser may do with the page.

An ASGI middleware inside Gradio's app. Routes that the chat page does not use (uploads, files, the API listing, the
proxy, component calls ...) do not exist; events that name a file or an address for Gradio to read are refused; and the
page carries a content security policy under which no script but our own runs and nothing is loaded from another host.
Keys, hosts and origins are checked by the server it is mounted in.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import cast

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["PageGuard", "is_page_route"]

_PAGE_ROUTES: dict[str, re.Pattern[str]] = {
    "GET": re.compile(
        r"/(config/?|theme\.css|favicon\.ico|robots\.txt|(assets|static)/[\w./-]+"
        r"|gradio_api/(queue/data|heartbeat/\w+|startup-events|theme\.css))?"
    ),
    "HEAD": re.compile(r"/"),
    "POST": re.compile(r"/gradio_api/(queue/join/?|cancel|reset/?)"),
}

# Gradio compiles the handlers it ships to the browser with `new Function`, hence unsafe-eval: code that is in the page
# already. Inline scripts need this response's nonce, and inline handlers (onerror=...) cannot run at all.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-eval' 'nonce-{nonce}'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-src 'none'; frame-ancestors 'none'"
)

_SOCIAL_META = re.compile(r"<meta\s+(property=\"og:|name=\"twitter:)[^>]*/>\s*")
_MANIFEST = re.compile(r"<link rel=\"manifest\"[^>]*>\s*")


def is_page_route(method: str, path: str) -> bool:
    allowed = _PAGE_ROUTES.get(method)
    return allowed is not None and allowed.fullmatch(path) is not None and ".." not in path


class PageGuard:
    """`script` is our own, and goes into the page's head."""

    def __init__(self, app: ASGIApp, *, script: str) -> None:
        self._app = app
        self._script = script

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if not is_page_route(scope["method"], path):
            await PlainTextResponse("Not found\n", status_code=404)(scope, receive, send)
        elif path == "/":
            await self._send_page(scope, receive, send)
        elif scope["method"] == "POST":
            await self._pass_event(scope, receive, send)
        else:
            await self._app(scope, receive, _with_headers(send))

    async def _pass_event(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a JSON body on, unless it holds what Gradio would open or fetch as a file."""
        body = await _read_body(receive)
        if body is None:
            return
        try:
            is_harmless = not _names_a_file(json.loads(body))
        except (ValueError, RecursionError):
            is_harmless = False
        if not is_harmless:
            await PlainTextResponse("The chat page takes no files\n", status_code=400)(scope, receive, send)
            return
        is_delivered = False

        async def replay() -> Message:
            nonlocal is_delivered
            if is_delivered:
                return await receive()
            is_delivered = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, _with_headers(send))

    async def _send_page(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The HTML is held back whole, to put this response's nonce into it."""
        # A deep link would read a file that an earlier visitor had the server write.
        scope = {**scope, "query_string": b""}
        nonce = secrets.token_urlsafe(16)
        start: Message = {}
        body = bytearray()

        async def hold(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
                return
            body.extend(message.get("body", b""))
            if message.get("more_body"):
                return
            page = self._finish(body.decode(), nonce).encode() if body else b""
            headers = MutableHeaders(raw=start["headers"])
            headers["content-security-policy"] = _POLICY.format(nonce=nonce)
            headers["cache-control"] = "no-store"
            if page:
                headers["content-length"] = str(len(page))
            start["headers"] = headers.raw
            await _with_headers(send)(start)
            await send({"type": "http.response.body", "body": page})

        await self._app(scope, receive, hold)

    def _finish(self, page: str, nonce: str) -> str:
        page = _MANIFEST.sub("", _SOCIAL_META.sub("", page))
        page = page.replace("</head>", f"<script>{self._script}</script></head>", 1)
        # The configuration is JSON with "<" written as an escape, so each "<script" here opens a tag.
        return page.replace("<script", f'<script nonce="{nonce}"')


async def _read_body(receive: Receive) -> bytes | None:
    """None when the client left. How long a body may be is checked by the server that the page is mounted in."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body.extend(message.get("body", b""))
        if not message.get("more_body"):
            return bytes(body)


def _names_a_file(value: object) -> bool:
    """Gradio takes any object with these two keys, wherever it stands in an input, for a file to read or download."""
    pending: list[object] = [value]
    while pending:
        match pending.pop():
            case dict() as mapping:
                if "path" in mapping and "meta" in mapping:
                    return True
                pending.extend(cast("dict[str, object]", mapping).values())
            case list() as items:
                pending.extend(cast("list[object]", items))
            case _:
                pass
    return False


def _with_headers(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            headers["x-content-type-options"] = "nosniff"
            headers["referrer-policy"] = "no-referrer"
            headers.setdefault("x-frame-options", "DENY")
            message["headers"] = headers.raw
        await send(message)

    return wrapped
