"""The client of the public API: what it sends, how it reads a stream, and what each failure becomes."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import httpx
import pytest

from ui.client import ApiClient, ApiProblem, ChatEvent, ChatMessage, Finish, ProblemKind, Readiness, Sampling, TextDelta

pytestmark = pytest.mark.unit

Handler = Callable[[httpx.Request], httpx.Response]


def client_of(handler: Handler) -> ApiClient:
    return ApiClient("http://server", transport=httpx.MockTransport(handler))


def answering(status: int, body: object = None, **headers: str) -> ApiClient:
    return client_of(lambda _: httpx.Response(status, json=body, headers=headers))


def sse(*chunks: object, end: str = "data: [DONE]\n\n") -> ApiClient:
    text = "".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in chunks) + end
    return client_of(lambda _: httpx.Response(200, text=text, headers={"Content-Type": "text/event-stream"}))


def chunk(text: str | None = None, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": reason}]}


async def chat(client: ApiClient, sampling: Sampling | None = None) -> list[ChatEvent]:
    messages = [ChatMessage("user", "Hi")]
    stream = client.stream_chat("m", messages, sampling or Sampling(), authorization="Bearer k")
    async with aclosing(stream):
        return [event async for event in stream]


async def problem_of(client: ApiClient) -> ApiProblem:
    with pytest.raises(ApiProblem) as caught:
        await chat(client)
    return caught.value


async def test_the_request_is_what_the_api_documents() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, text="data: [DONE]\n\n")

    await chat(client_of(handler), Sampling(temperature=0.0, seed=0))
    (request,) = seen
    assert request.url == "http://server/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer k"
    assert "origin" not in request.headers
    assert json.loads(request.content) == {
        "model": "m",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "seed": 0,
    }


async def test_a_stream_is_its_texts_and_then_its_end() -> None:
    usage = {"choices": [], "usage": {"completion_tokens": 7}}
    client = sse(chunk(""), chunk("你好"), chunk(" 🌱"), chunk(reason="stop"), usage)
    assert await chat(client) == [TextDelta("你好"), TextDelta(" 🌱"), Finish("stop", 7)]


async def test_pings_and_carriage_returns_are_no_events() -> None:
    text = f": ping\r\n\r\ndata: {json.dumps(chunk('a'))}\r\n\r\nevent: x\r\ndata: [DONE]\r\n\r\n"
    client = client_of(lambda _: httpx.Response(200, text=text))
    assert await chat(client) == [TextDelta("a"), Finish(None, None)]


async def test_a_stream_that_breaks_off_has_no_reason() -> None:
    assert await chat(sse(chunk("a"), end="")) == [TextDelta("a"), Finish(None, None)]


async def test_an_error_in_the_stream_is_a_problem() -> None:
    problem = await problem_of(sse(chunk("a"), {"error": {"message": "gone", "code": "engine_stopped"}}))
    assert (problem.kind, problem.message) == (ProblemKind.UNAVAILABLE, "gone")


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "content_filter", ProblemKind.REFUSED),
        (400, "context_length_exceeded", ProblemKind.TOO_LONG),
        (400, None, ProblemKind.INVALID),
        (401, "invalid_api_key", ProblemKind.KEY),
        (403, None, ProblemKind.INVALID),
        (404, "model_not_found", ProblemKind.UNAVAILABLE),
        (413, None, ProblemKind.TOO_LONG),
        (429, "queue_full", ProblemKind.BUSY),
        (429, None, ProblemKind.BUSY),
        (500, None, ProblemKind.BROKEN),
        (503, "engine_stopped", ProblemKind.UNAVAILABLE),
    ],
)
async def test_each_refusal_has_its_kind(status: int, code: str | None, kind: ProblemKind) -> None:
    problem = await problem_of(answering(status, {"error": {"message": "why", "code": code}}))
    assert (problem.kind, problem.message) == (kind, "why")


async def test_a_busy_server_says_for_how_long() -> None:
    assert (await problem_of(answering(429, {}, **{"Retry-After": "7"}))).retry_after_s == 7


async def test_no_server_and_no_sense_are_problems() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    assert (await problem_of(client_of(refuse))).kind is ProblemKind.UNREACHABLE
    assert (await problem_of(client_of(lambda _: httpx.Response(502, text="<html>")))).kind is ProblemKind.BROKEN
    assert (
        await problem_of(client_of(lambda _: httpx.Response(200, text="data: {oops\n\n")))
    ).kind is ProblemKind.BROKEN


async def test_readiness_tells_preparation_from_an_engine_that_starts() -> None:
    progress = {"stage": "Downloading", "done": 1, "total": 4, "percent": 25.0}
    waiting = {"status": "waiting", "waiting_for": "the model", "progress": progress, "error": None}
    readiness = await answering(503, waiting).readiness(authorization=None)
    assert readiness == Readiness(ready=False, is_preparing=True, stage="Downloading", done=1, total=4)
    assert readiness.fraction == 0.25
    starting = {"status": "waiting", "waiting_for": "the engine is restarting", "progress": None, "error": None}
    readiness = await answering(503, starting).readiness(authorization=None)
    assert readiness == Readiness(ready=False, stage="the engine is restarting")
    assert (await answering(200, {"status": "ready"}).readiness(authorization=None)).ready


async def test_the_models_name_is_the_first_listed() -> None:
    assert await answering(200, {"data": [{"id": "tiny"}]}).model_name(authorization=None) == "tiny"
    with pytest.raises(ApiProblem):
        await answering(200, {"data": []}).model_name(authorization=None)
