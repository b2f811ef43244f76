"""A client that leaves, and a cancel call, end the work in the engine: before the first token, in a stream, joined."""

from __future__ import annotations

import asyncio

import pytest

from serving.engine.requests import EngineRequest
from serving.errors import EngineStopped, QueueFull
from serving.gateway.app import build_app
from serving.gateway.ports import Services
from tests.serving.gateway.asgi import HangingClient
from tests.serving.gateway.fakes import (
    ScriptedEngine,
    ScriptedStream,
    Step,
    chat_body,
    client_of,
    make_services,
    token,
)

pytestmark = pytest.mark.unit

CHAT = "/v1/chat/completions"


def silent_engine() -> ScriptedEngine:
    return ScriptedEngine(lambda request: [])


def started(services: Services, **fields: object) -> HangingClient:
    client = HangingClient(build_app(services))
    client.post(CHAT, chat_body("Hi", **fields))
    return client


def disconnects(services: Services) -> float | None:
    return services.metrics.registry.get_sample_value("causerie_disconnects_total")


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_client_that_leaves_before_the_first_token_ends_the_work(is_streamed: bool) -> None:
    engine = silent_engine()
    services = make_services(engine)
    client = started(services, stream=is_streamed, n=2)
    await engine.has_request.wait()
    await client.hang_up()
    (stream,) = engine.streams.values()
    await asyncio.wait_for(stream.is_closed.wait(), 5)
    assert engine.abandoned == [stream.request.request_id]
    assert disconnects(services) == 1


async def test_a_client_that_leaves_in_the_middle_of_a_stream_ends_the_work() -> None:
    engine = ScriptedEngine(lambda request: [token(request, "Hello")])
    services = make_services(engine)
    client = started(services, stream=True)
    await client.has_text.wait()
    await client.hang_up()
    (stream,) = engine.streams.values()
    await asyncio.wait_for(stream.is_closed.wait(), 5)
    assert engine.abandoned == [stream.request.request_id]
    assert b"[DONE]" not in client.content
    assert disconnects(services) == 1


async def test_a_client_that_leaves_during_a_score_request_ends_the_work() -> None:
    engine = silent_engine()
    client = HangingClient(build_app(make_services(engine)))
    client.post("/v1/completions", {"model": "tiny", "prompt": "Hi", "echo": True, "logprobs": 0, "max_tokens": 0})
    await engine.has_request.wait()
    await client.hang_up()
    assert len(engine.abandoned) == 1


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_an_answer_that_ended_is_no_disconnect(is_streamed: bool) -> None:
    engine = ScriptedEngine()
    services = make_services(engine)
    client = started(services, stream=is_streamed)
    await client.end()
    assert client.status == 200
    assert engine.abandoned == []
    assert disconnects(services) == 0


async def test_all_prompts_of_a_completion_end_with_the_client() -> None:
    engine = silent_engine()
    client = HangingClient(build_app(make_services(engine)))
    client.post("/v1/completions", {"model": "tiny", "prompt": ["a", "b", "c"]})
    await engine.has_request.wait()
    await client.hang_up()
    await asyncio.gather(*(stream.is_closed.wait() for stream in engine.streams.values()))
    assert len(engine.abandoned) == 3


@pytest.mark.parametrize("id_prefix", ["chatcmpl-", ""])
async def test_a_cancel_call_ends_a_stream_with_stop(id_prefix: str) -> None:
    engine = ScriptedEngine(lambda request: [token(request, "Hello")])
    services = make_services(engine)
    client = started(services, stream=True)
    await client.has_text.wait()
    request_id = dict(client.messages[0]["headers"])[b"x-request-id"].decode()
    async with client_of(client.app) as other:
        response = await other.post(f"/v1/requests/{id_prefix}{request_id}/cancel")
    assert response.status_code == 200
    assert response.json() == {
        "id": f"{id_prefix}{request_id}",
        "object": "request.cancellation",
        "cancelled": True,
    }
    await client.end()
    assert engine.cancelled == [(engine.generated.request_id, None)]
    assert client.content.count(b'"finish_reason":"stop"') == 1
    assert client.content.endswith(b"data: [DONE]\n\n")
    assert disconnects(services) == 0


async def test_an_ended_request_cannot_be_cancelled() -> None:
    app = build_app(make_services())
    async with client_of(app) as client:
        answered = await client.post(CHAT, json=chat_body())
        response = await client.post(f"/v1/requests/{answered.json()['id']}/cancel")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "request_not_found"


async def test_a_prompt_that_the_queue_refuses_ends_those_before_it() -> None:
    engine = silent_engine()
    accepted = engine.submit

    def submit_once(request: EngineRequest) -> ScriptedStream:
        if engine.requests:
            raise QueueFull("full", retry_after_s=1)
        return accepted(request)

    engine.submit = submit_once  # pyright: ignore[reportAttributeAccessIssue]
    async with client_of(build_app(make_services(engine))) as client:
        response = await client.post("/v1/completions", json={"model": "tiny", "prompt": ["a", "b"]})
    assert response.status_code == 429
    (stream,) = engine.streams.values()
    await asyncio.wait_for(stream.is_closed.wait(), 5)
    assert len(engine.abandoned) == 1


async def test_one_prompt_that_fails_ends_the_others() -> None:
    def script(request: EngineRequest) -> list[Step]:
        return [EngineStopped("gone", retry_after_s=1)] if request.request_id.endswith(".0") else []

    engine = ScriptedEngine(script)
    async with client_of(build_app(make_services(engine))) as client:
        response = await client.post("/v1/completions", json={"model": "tiny", "prompt": ["a", "b"]})
    assert response.status_code == 503
    await asyncio.gather(*(stream.is_closed.wait() for stream in engine.streams.values()))
    assert len(engine.abandoned) == 1
