"""Streams byte by byte: LF only, one role chunk, one end per choice, usage, errors in the middle, `[DONE]`."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from serving.engine.requests import EngineRequest
from serving.errors import EngineStopped
from serving.gateway.app import build_app
from serving.gateway.ports import GatewaySettings
from tests.serving.gateway.asgi import HangingClient
from tests.serving.gateway.fakes import (
    ScriptedEngine,
    Step,
    chat_body,
    client_for,
    fail,
    make_services,
    say,
    token,
)

pytestmark = pytest.mark.unit

HEAD = '"object":"chat.completion.chunk","created":{created},"model":"tiny","choices":[{{"index":0,'
ROLE = '"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null'


async def stream(engine: ScriptedEngine, path: str = "/v1/chat/completions", **fields: object) -> httpx.Response:
    body = chat_body() if path.endswith("chat/completions") else {"model": "tiny", "prompt": "Hi"}
    async with client_for(engine) as client:
        response = await client.post(path, json={**body, "stream": True, **fields})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return response


def events(response: httpx.Response) -> list[dict[str, object]]:
    lines = response.text.removesuffix("data: [DONE]\n\n").split("\n\n")
    assert response.text.endswith("data: [DONE]\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line]


def head(response: httpx.Response) -> str:
    first = events(response)[0]
    return f'data: {{"id":"chatcmpl-{response.headers["x-request-id"]}",' + HEAD.format(created=first["created"])


async def test_golden_bytes_of_a_plain_stream() -> None:
    engine = ScriptedEngine(lambda request: say(request, "日本\n", '"😀"\u2028'))
    response = await stream(engine)
    start = head(response)
    expected = (
        f"{start}{ROLE}}}]}}\n\n"
        # Both texts were there before the first chunk was sent, so they come as one.
        f'{start}"delta":{{"content":"日本\\n\\"😀\\"\u2028"}},"logprobs":null,"finish_reason":null}}]}}\n\n'
        f'{start}"delta":{{}},"logprobs":null,"finish_reason":"stop"}}]}}\n\n'
        "data: [DONE]\n\n"
    )
    assert response.content == expected.encode()
    assert b"\r" not in response.content


async def test_golden_bytes_with_usage() -> None:
    response = await stream(ScriptedEngine(lambda r: say(r, "Hi")), stream_options={"include_usage": True})
    start = head(response)
    last = start.removesuffix('[{"index":0,')
    assert (
        response.content
        == (
            f'{start}{ROLE}}}],"usage":null}}\n\n'
            f'{start}"delta":{{"content":"Hi"}},"logprobs":null,"finish_reason":null}}],"usage":null}}\n\n'
            f'{start}"delta":{{}},"logprobs":null,"finish_reason":"stop"}}],"usage":null}}\n\n'
            f'{last}[],"usage":{{"prompt_tokens":8,"completion_tokens":3,"total_tokens":11,'
            '"prompt_tokens_details":{"cached_tokens":0}}}\n\n'
            "data: [DONE]\n\n"
        ).encode()
    )


@pytest.mark.parametrize("ends_by_exception", [False, True])
async def test_golden_bytes_of_a_failure_in_the_middle(ends_by_exception: bool) -> None:
    def script(request: EngineRequest) -> list[Step]:
        failure = fail(request, "engine_stopped", "the engine died")
        return [token(request, "Hel"), EngineStopped("the engine died") if ends_by_exception else failure]

    response = await stream(ScriptedEngine(script))
    start = head(response)
    error = '{"message":"the engine died","type":"server_error","param":null,"code":"engine_stopped"}'
    assert (
        response.content
        == (
            f"{start}{ROLE}}}]}}\n\n"
            f'{start}"delta":{{"content":"Hel"}},"logprobs":null,"finish_reason":null}}]}}\n\n'
            f'data: {{"error":{error}}}\n\n'
            "data: [DONE]\n\n"
        ).encode()
    )


async def test_a_silent_stream_is_kept_open_by_comments() -> None:
    engine = ScriptedEngine(lambda request: [token(request, "Hel")])
    client = HangingClient(build_app(make_services(engine, settings=GatewaySettings(ping_interval_s=0.01))))
    client.post("/v1/chat/completions", chat_body(stream=True))
    await asyncio.wait_for(client.has_ping.wait(), 5)
    (running,) = engine.streams.values()
    running.push(token(running.request, "lo", finish="stop"))
    await client.end()
    pings = [message["body"] for message in client.messages[1:] if message["body"].startswith(b":")]
    assert set(pings) == {b": ping\n\n"}
    assert client.content.endswith(b"data: [DONE]\n\n")


async def test_every_choice_ends_once() -> None:
    response = await stream(ScriptedEngine(lambda request: say(request, "a", "b")), n=3)
    ends: list[int] = []
    texts = ["", "", ""]
    for chunk in events(response):
        (choice,) = chunk["choices"]  # pyright: ignore
        texts[choice["index"]] += choice["delta"].get("content", "")
        if choice["finish_reason"]:
            ends.append(choice["index"])
    assert sorted(ends) == [0, 1, 2]
    assert texts == ["ab", "ab", "ab"]


async def test_an_event_without_text_sends_nothing_and_its_logprobs_come_with_the_text() -> None:
    def script(request: EngineRequest) -> list[Step]:
        first, second = "é".encode()
        return [
            token(request, "", ids=[first]),
            token(request, "é", ids=[second]),
            token(request, "", ids=[256], finish="stop"),
        ]

    response = await stream(ScriptedEngine(script), logprobs=True)
    _role, text, end = [chunk["choices"][0] for chunk in events(response)]  # pyright: ignore
    assert text["delta"]["content"] == "é"
    assert [entry["bytes"] for entry in text["logprobs"]["content"]] == [[0xC3], [0xA9]]
    assert (end["delta"], end["logprobs"], end["finish_reason"]) == ({}, None, "stop")


async def test_text_completion_chunks() -> None:
    response = await stream(ScriptedEngine(lambda request: say(request, "Hi")), path="/v1/completions")
    (only,) = events(response)
    assert only["object"] == "text_completion"
    assert only["choices"] == [{"index": 0, "text": "Hi", "logprobs": None, "finish_reason": "stop"}]


async def test_echo_streams_the_prompt_first() -> None:
    response = await stream(ScriptedEngine(lambda request: say(request, "!")), path="/v1/completions", echo=True)
    assert [chunk["choices"][0]["text"] for chunk in events(response)] == ["Hi", "!"]  # pyright: ignore


async def test_streamed_text_is_the_joined_text() -> None:
    engine = ScriptedEngine(lambda request: say(request, *"Grüße, 世界! 👋🏽"))
    streamed = await stream(engine)
    async with client_for(engine) as client:
        joined = await client.post("/v1/chat/completions", json=chat_body())
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in events(streamed))  # pyright: ignore
    assert text == joined.json()["choices"][0]["message"]["content"] == "Grüße, 世界! 👋🏽"
