"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`.

Retry-After where there is one. Also the way back from an engine's `FailedEvent` to the error class it names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from serving.engine.requests import FailedEvent
from serving.errors import (
    ContentFlagged,
    EngineStopped,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    ServiceError,
    Unavailable,
)
from serving.gateway.fields import JsonObject


def error_body(error: ServiceError) -> JsonObject:
    shown: JsonObject = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
    if isinstance(error, ContentFlagged):
        result = cast("JsonObject", error.content_filter_result)
        shown["innererror"] = {"code": "ResponsibleAIPolicyViolation", "content_filter_result": result}
    return {"error": shown}


def json_response(body: JsonObject, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def error_response(error: ServiceError, headers: dict[str, str] | None = None) -> Response:
    retry = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return json_response(error_body(error), error.status, retry | (headers or {}))


async def on_service_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return error_response(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """What the router itself refuses: an unknown path or method."""
    assert isinstance(error, HTTPException)
    body = error_body(InvalidRequest(f"{error.detail}: {request.method} {request.url.path}"))
    return json_response(body, error.status_code, dict(error.headers or {}))


async def on_client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # for the log and the metrics; nobody reads it


class PromptRefusedByEngine(InvalidRequest):
    """The engine's own PromptTooLong, whose numbers are in its message."""

    code = PromptTooLong.code


_ENGINE_ERRORS: Mapping[str, type[ServiceError]] = {
    "invalid_request_error": InvalidRequest,
    "context_length_exceeded": PromptRefusedByEngine,
    "queue_full": QueueFull,
    "engine_stopped": EngineStopped,
    "unavailable": Unavailable,
}


def error_of_event(event: FailedEvent) -> ServiceError:
    """The engine's failure as the error it names; one that is not known here is the server's fault."""
    kind = _ENGINE_ERRORS.get(event.code, ServiceError)
    return kind(event.message, retry_after_s=1 if kind.status in (429, 503) else None)
