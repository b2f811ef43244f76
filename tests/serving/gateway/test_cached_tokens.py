"""What the prefix cache saved shows in `usage`, and API keys find nothing of each other unless the settings say so."""

from __future__ import annotations

import httpx
import msgspec
import pytest

from serving.engine.requests import EngineRequest, GenerateRequest, ScoreRequest
from serving.gateway.app import build_app
from serving.gateway.ports import GatewaySettings
from tests.serving.gateway.fakes import (
    MODEL_ID,
    ScriptedEngine,
    Step,
    chat_body,
    make_services,
    token,
)

pytestmark = pytest.mark.unit

KEY = "sk-correct"
CHAT = "/v1/chat/completions"


def finding(*num_reused: int) -> ScriptedEngine:
    """Choice i of every request finds that many tokens of its prompt."""

    def script(request: EngineRequest) -> list[Step]:
        return [
            msgspec.structs.replace(token(request, "a", index, finish="stop"), num_reused_tokens=count)
            for index, count in enumerate(num_reused)
        ]

    return ScriptedEngine(script)


async def post(engine: ScriptedEngine, path: str, body: dict[str, object], **settings: object) -> httpx.Response:
    services = make_services(engine, settings=GatewaySettings(**settings))  # pyright: ignore[reportArgumentType]
    headers = {"Authorization": f"Bearer {KEY}"} if "api_key" in settings else {}
    transport = httpx.ASGITransport(build_app(services))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
        response = await client.post(path, json=body)
    assert response.status_code == 200
    return response


async def test_usage_says_what_the_first_choice_found() -> None:
    """The others also find what the first one has just computed: that is no saving of the request."""
    body = (await post(finding(16, 32, 32), CHAT, chat_body("Hi", n=3))).json()
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}


async def test_several_prompts_add_up() -> None:
    body = (await post(finding(16, 48), "/v1/completions", {"model": MODEL_ID, "prompt": ["a", "b"], "n": 2})).json()
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}


async def test_a_stream_says_it_in_its_last_chunk() -> None:
    body = chat_body("Hi", stream=True, stream_options={"include_usage": True})
    text = (await post(finding(16), CHAT, body)).text
    assert '"prompt_tokens_details":{"cached_tokens":16}' in text


@pytest.mark.parametrize(
    ("settings", "salt"),
    [
        ({}, ""),
        ({"api_key": KEY}, "key:default"),
        ({"api_key": KEY, "shares_prefix_cache": True}, ""),
    ],
    ids=["no key", "key", "shared"],
)
async def test_the_salt_is_the_name_of_the_key(settings: dict[str, object], salt: str) -> None:
    engine = finding(0)
    await post(engine, CHAT, chat_body("Hi"), **settings)
    scripted = ScriptedEngine()
    echoed: dict[str, object] = {"model": MODEL_ID, "prompt": "ab", "echo": True, "logprobs": 0, "max_tokens": 1}
    await post(scripted, "/v1/completions", echoed, **settings)
    requests = [*engine.requests, *scripted.requests]
    assert {type(request) for request in requests} == {GenerateRequest, ScoreRequest}
    assert {request.cache_salt for request in requests} == {salt}
