"""Gives every request an id and a start time, counts its answer, and turns a bug into a 500 in OpenAI's shape.

Outermost of our middleware. The id comes back as `x-request-id`; a completion's id is the same behind its prefix.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ServiceError
from serving.gateway.error_responses import error_response
from serving.metrics import Metrics

logger = logging.getLogger(__name__)

_SCOPE_KEY = "causerie.request"
# One label per route: a path that a client made up must not become a metric.
_ENDPOINTS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/moderations": "moderations",
    "/v1/models": "models",
}


@dataclass(frozen=True, slots=True)
class RequestContext:
    request_id: str
    arrived_at: float  # on the clock of the middleware


def context_of(request: Request) -> RequestContext:
    return request.scope[_SCOPE_KEY]


class RequestContextMiddleware:
    def __init__(self, app: ASGIApp, *, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self.app = app
        self.metrics = metrics
        self.clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        context = RequestContext(secrets.token_hex(16), self.clock())
        scope[_SCOPE_KEY] = context
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", context.request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            logger.exception("request_failed request=%s path=%s", context.request_id, scope["path"])
            if status is not None:
                raise
            error = ServiceError(f"internal error; the server's log has it under request {context.request_id}")
            await error_response(error)(scope, receive, send_with_id)
        finally:
            self._count(scope, status, context)

    def _count(self, scope: Scope, status: int | None, context: RequestContext) -> None:
        endpoint = _ENDPOINTS.get(scope["path"])
        if endpoint is not None and status is not None:
            self.metrics.request_finished(endpoint, status, self.clock() - context.arrived_at)
