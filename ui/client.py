"""HTTP client of the public API: streamed chat completions, the model's name, and whether the server is ready.

It knows only what any client of an OpenAI-compatible server knows, plus `/health/ready`. Every failure becomes an
`ApiProblem` of a finite kind, so that the page can say the right thing about it. Called by `ui.turn` and `ui.page`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from typing import Any, Literal, TypeAlias, cast

import httpx

__all__ = ["ApiClient", "ApiProblem", "ChatMessage", "Finish", "ProblemKind", "Readiness", "Sampling", "TextDelta"]

# Between two events of a stream; long enough for a slow machine to read a long prompt.
READ_TIMEOUT_S = 300.0
CONNECT_TIMEOUT_S = 5.0
SHORT_TIMEOUT_S = 5.0


class ProblemKind(StrEnum):
    REFUSED = "refused"  # moderation
    BUSY = "busy"  # queue full or rate limit
    KEY = "key"  # no key or a wrong one
    TOO_LONG = "too_long"  # the conversation does not fit
    UNAVAILABLE = "unavailable"  # preparing, or the engine restarts
    INVALID = "invalid"  # a setting the server does not accept
    UNREACHABLE = "unreachable"
    BROKEN = "broken"  # anything else


class ApiProblem(Exception):
    """The API said no, or said nothing. `message` is the server's own sentence where there was one."""

    def __init__(self, kind: ProblemKind, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """What is None is left out of the request, so the model's own default holds."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None

    def as_fields(self) -> dict[str, float | int]:
        fields = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
        }
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True)
class TextDelta:
    text: str


@dataclass(frozen=True, slots=True)
class Finish:
    reason: str | None  # "stop", "length", "content_filter"; None when the stream ended without one
    completion_tokens: int | None
    refusal: str | None = None  # why the rest of the answer was withheld, in the server's words


ChatEvent: TypeAlias = TextDelta | Finish


@dataclass(frozen=True, slots=True)
class Readiness:
    """`stage`, `done` and `total` say how far a server is that is not ready; `total` is None when unknown.

    `is_preparing`: there is no model yet, which takes minutes; otherwise it is the engine that starts, in seconds.
    """

    ready: bool
    is_preparing: bool = False
    stage: str = ""
    done: float = 0.0
    total: float | None = None
    error: str | None = None

    @property
    def fraction(self) -> float | None:
        if self.total is None or self.total <= 1:  # one step: begun or done, nothing to measure
            return None
        return min(max(self.done / self.total, 0.0), 1.0)


class ApiClient:
    """One pool of connections for the whole page. `base_url` is the server's address without `/v1`.

    `authorization` is the header that the visitor's browser sent: the page may do what its visitor may, no more.
    """

    def __init__(self, base_url: str, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        # trust_env off: a proxy in the environment must never see what is said to the server on this machine.
        self._http = httpx.AsyncClient(
            base_url=base_url.rstrip("/"),
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=16),
            trust_env=False,
            transport=transport,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def stream_chat(
        self, model: str, messages: Sequence[ChatMessage], sampling: Sampling, *, authorization: str | None
    ) -> AsyncGenerator[ChatEvent, None]:
        """Text as it comes, then exactly one `Finish`. Closing the generator hangs up, which stops the engine.

        Raises `ApiProblem`, before the first event or in the middle of the stream.
        """
        body: dict[str, object] = {
            "model": model,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            **sampling.as_fields(),
        }
        async with AsyncExitStack() as stack:
            try:
                response = await stack.enter_async_context(
                    self._http.stream("POST", "/v1/chat/completions", json=body, headers=_headers(authorization))
                )
                if response.status_code != HTTPStatus.OK:
                    await response.aread()
                    raise _problem_of_response(response)
                async for event in _chat_events(response):
                    yield event
            except httpx.HTTPError as error:
                raise _problem_of_transport(error) from error

    async def model_name(self, *, authorization: str | None) -> str:
        body = await self._get_json("/v1/models", authorization)
        models = body.get("data")
        if isinstance(models, list) and models and isinstance(models[0], dict):
            return str(cast("dict[str, Any]", models[0]).get("id", ""))
        raise ApiProblem(ProblemKind.UNAVAILABLE, "no model is loaded yet")

    async def readiness(self, *, authorization: str | None) -> Readiness:
        try:
            response = await self._http.get("/health/ready", headers=_headers(authorization), timeout=SHORT_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise _problem_of_transport(error) from error
        if response.status_code == HTTPStatus.OK:
            return Readiness(ready=True)
        if response.status_code != HTTPStatus.SERVICE_UNAVAILABLE:
            raise _problem_of_response(response)
        return _readiness_of(_json_object(response))

    async def _get_json(self, path: str, authorization: str | None) -> dict[str, Any]:
        try:
            response = await self._http.get(path, headers=_headers(authorization), timeout=SHORT_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise _problem_of_transport(error) from error
        if response.status_code != HTTPStatus.OK:
            raise _problem_of_response(response)
        return _json_object(response)


async def _chat_events(response: httpx.Response) -> AsyncGenerator[ChatEvent, None]:
    reason: str | None = None
    completion_tokens: int | None = None
    refusal: str | None = None
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue  # blank separators, comments that keep the connection alive
        payload = line.removeprefix("data:").strip()
        if payload == "[DONE]":
            break
        chunk = _parse_object(payload)
        if isinstance(chunk.get("error"), dict):
            raise _problem_of_error(cast("dict[str, Any]", chunk["error"]), status=None)
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            completion_tokens = cast("dict[str, Any]", usage).get("completion_tokens")
        for choice in cast("list[dict[str, Any]]", chunk.get("choices") or []):
            reason = choice.get("finish_reason") or reason
            delta = cast("dict[str, Any]", choice.get("delta") or {})
            refusal = delta.get("refusal") or refusal
            if delta.get("content"):
                yield TextDelta(delta["content"])
    yield Finish(reason, completion_tokens, refusal)


def _headers(authorization: str | None) -> dict[str, str]:
    return {"Authorization": authorization} if authorization else {}


def _parse_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ApiProblem(ProblemKind.BROKEN, "the server sent something that is not JSON") from error
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _json_object(response: httpx.Response) -> dict[str, Any]:
    try:
        return _parse_object(response.text)
    except ApiProblem:
        return {}


def _problem_of_transport(error: httpx.HTTPError) -> ApiProblem:
    if isinstance(error, httpx.ReadTimeout):
        return ApiProblem(ProblemKind.BROKEN, "the server stopped sending")
    return ApiProblem(ProblemKind.UNREACHABLE, "the server cannot be reached")


def _problem_of_response(response: httpx.Response) -> ApiProblem:
    error = _json_object(response).get("error")
    fields = cast("dict[str, Any]", error) if isinstance(error, dict) else {}
    retry_after = response.headers.get("retry-after", "")
    return _problem_of_error(
        fields, status=response.status_code, retry_after_s=int(retry_after) if retry_after.isdigit() else None
    )


_KIND_OF_CODE: Mapping[str, ProblemKind] = {
    "content_filter": ProblemKind.REFUSED,
    "context_length_exceeded": ProblemKind.TOO_LONG,
    "queue_full": ProblemKind.BUSY,
    "rate_limit_exceeded": ProblemKind.BUSY,
    "engine_stopped": ProblemKind.UNAVAILABLE,
    "moderation_unavailable": ProblemKind.UNAVAILABLE,
    "unavailable": ProblemKind.UNAVAILABLE,
    "invalid_api_key": ProblemKind.KEY,
}

_KIND_OF_STATUS: Mapping[int, ProblemKind] = {
    400: ProblemKind.INVALID,
    401: ProblemKind.KEY,
    403: ProblemKind.INVALID,
    404: ProblemKind.UNAVAILABLE,
    413: ProblemKind.TOO_LONG,
    422: ProblemKind.INVALID,
    429: ProblemKind.BUSY,
    503: ProblemKind.UNAVAILABLE,
}


def _problem_of_error(error: Mapping[str, Any], *, status: int | None, retry_after_s: int | None = None) -> ApiProblem:
    kind = _KIND_OF_CODE.get(str(error.get("code"))) or _KIND_OF_STATUS.get(status or 0, ProblemKind.BROKEN)
    message = error.get("message")
    default = f"the server answered with status {status}" if status else "the server ended the answer"
    return ApiProblem(kind, message if isinstance(message, str) else default, retry_after_s=retry_after_s)


def _readiness_of(body: Mapping[str, Any]) -> Readiness:
    progress = body.get("progress")
    fields = cast("dict[str, Any]", progress) if isinstance(progress, dict) else {}
    error = body.get("error")
    return Readiness(
        ready=False,
        is_preparing=bool(fields) or isinstance(error, str),
        stage=str(fields.get("stage") or body.get("waiting_for") or ""),
        done=_number(fields.get("done")) or 0.0,
        total=_number(fields.get("total")),
        error=error if isinstance(error, str) else None,
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
