"""What a request may carry: JSON, and no more than the cap, with or without a Content-Length."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import httpx
import pytest

from serving.gateway.ports import GatewaySettings, RequestLimits
from tests.serving.gateway.fakes import ScriptedEngine, chat_body, client_for

pytestmark = pytest.mark.unit

SETTINGS = GatewaySettings(limits=RequestLimits(max_body_bytes=500))


async def post(content: bytes | AsyncIterator[bytes], **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with client_for(ScriptedEngine(), settings=SETTINGS) as client:
        return await client.post(
            "/v1/chat/completions", content=content, headers={"content-type": "application/json", **named}
        )


def body_of(num_bytes: int) -> bytes:
    empty = json.dumps(chat_body("")).encode()
    return json.dumps(chat_body("x" * (num_bytes - len(empty)))).encode()


async def chunks(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 100):
        yield body[start : start + 100]


async def test_a_body_of_exactly_the_cap_is_read() -> None:
    assert (await post(body_of(500))).status_code == 200
    assert (await post(chunks(body_of(500)))).status_code == 200


async def test_a_larger_body_is_a_413_also_without_content_length() -> None:
    for content in (body_of(501), chunks(body_of(501))):
        response = await post(content)
        assert response.status_code == 413
        assert "500" in response.json()["error"]["message"]


@pytest.mark.parametrize("length", ["-1", "abc", "1e3", "9" * 30])
async def test_a_content_length_that_is_no_length_is_refused(length: str) -> None:
    assert (await post(chunks(body_of(100)), content_length=length)).status_code == 400


@pytest.mark.parametrize("content_type", ["text/plain", "", "application/x-www-form-urlencoded", "application/jsonx"])
async def test_only_json_is_read(content_type: str) -> None:
    response = await post(body_of(200), content_type=content_type)
    assert response.status_code == 415
    assert "application/json" in response.json()["error"]["message"]


async def test_json_with_a_charset_is_json() -> None:
    assert (await post(body_of(200), content_type="Application/JSON; charset=utf-8")).status_code == 200


async def test_a_compressed_body_is_refused() -> None:
    assert (await post(body_of(200), content_encoding="gzip")).status_code == 415


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b'"x"', b'{"model": NaN}', b'{"model": "\\ud800"}', b'{"model": "\xff"}', b"[" * 490, b"{} {}"],
)
async def test_what_is_not_a_json_object_is_a_400(content: bytes) -> None:
    response = await post(content)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_no_body_is_a_400() -> None:
    async with client_for() as client:
        response = await client.post("/v1/chat/completions")
    assert response.status_code == 400
