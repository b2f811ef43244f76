"""What a request may carry: JSON only under `/v1`, and a body no larger than the cap, declared or not."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import BodyTooLarge, InvalidRequest, ServiceError, UnsupportedMediaType
from serving.gateway.error_responses import error_response


class BodyMiddleware:
    """Reads the body here, up to the cap, and replays it: no route can forget the limit."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else None
        if headers is None or not _has_body(headers):
            await self.app(scope, receive, send)
            return
        refusal = _check_type(scope["path"], headers) or self._check_declared(headers.get("content-length"))
        if refusal is not None:
            await error_response(refusal)(scope, receive, send)
            return
        try:
            body = await self._read(receive)
        except BodyTooLarge as error:
            await error_response(error)(scope, receive, send)
            return
        if body is not None:
            await self.app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """None when the client left before its body was complete."""
        parts: list[bytes] = []
        num_bytes = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            num_bytes += len(part)
            if num_bytes > self.max_body_bytes:
                raise self._too_large(f"more than {self.max_body_bytes:,}")
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _check_declared(self, content_length: str | None) -> ServiceError | None:
        if content_length is None:
            return None
        if not (content_length.isascii() and content_length.isdigit()) or len(content_length) > 18:
            return InvalidRequest("Content-Length is not a length")
        return self._too_large(f"{int(content_length):,}") if int(content_length) > self.max_body_bytes else None

    def _too_large(self, size: str) -> BodyTooLarge:
        return BodyTooLarge(f"the body has {size} bytes; this server accepts {self.max_body_bytes:,}")


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def _check_type(path: str, headers: Headers) -> ServiceError | None:
    if not path.startswith("/v1/"):
        return None
    if headers.get("content-encoding", "identity").lower() != "identity":
        return UnsupportedMediaType("send the body without Content-Encoding")
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        shown = media_type[:60] or "nothing"
        return UnsupportedMediaType(f"Content-Type must be application/json, not {shown}")
    return None


def _replay(body: bytes, receive: Receive) -> Receive:
    is_delivered = False

    async def replay() -> Message:
        nonlocal is_delivered
        if is_delivered:
            return await receive()  # only a disconnect can follow
        is_delivered = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
