"""Who gets in: Host, Origin and key, on every route but `/health/live`."""

from __future__ import annotations

import base64
from collections.abc import Mapping

import httpx
import pytest
from fastapi import FastAPI, WebSocket
from starlette.datastructures import Headers
from starlette.routing import Mount, Route
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from serving.gateway.app import build_app
from serving.gateway.auth import HostCheck, KeyCheck
from serving.gateway.ports import GatewaySettings
from tests.serving.gateway.fakes import chat_body, client_of, make_services

pytestmark = pytest.mark.unit

KEY = "sk-correct"
BEARER = {"Authorization": f"Bearer {KEY}"}


def make_app(**settings: object) -> FastAPI:
    return build_app(make_services(settings=GatewaySettings(**settings)))  # pyright: ignore


async def get(app: FastAPI, path: str, headers: Mapping[str, str]) -> httpx.Response:
    async with client_of(app) as client:
        return await client.get(path, headers=headers)


async def post_chat(app: FastAPI, headers: Mapping[str, str]) -> httpx.Response:
    async with client_of(app) as client:
        return await client.post("/v1/chat/completions", json=chat_body(), headers=headers)


def test_every_route_but_live_is_behind_the_key() -> None:
    app = make_app(api_key=KEY)

    async def page(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("the page was reached without a key")

    app.mount("/", page)
    client = TestClient(app, base_url="http://localhost")
    paths = [route.path for route in app.router.routes if isinstance(route, Route | Mount)]
    assert len(paths) > 10
    for path in {*paths, "/", "/assets/x.js", "/v1/unknown"} - {"/health/live"}:
        for method in ("GET", "POST", "OPTIONS"):
            response = client.request(method, path.replace("{", "").replace("}", ""))
            assert response.status_code == 401, (method, path)
            assert response.json()["error"]["code"] == "invalid_api_key"
    assert client.get("/health/live").status_code == 200


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer {KEY}", 200),
        ("Basic " + base64.b64encode(f"me:{KEY}".encode()).decode(), 200),
        ("Basic " + base64.b64encode(b"me:wrong").decode(), 401),
        ("Basic ***", 401),
        (f"Bearer {KEY.upper()}", 401),
        (f"Bearer {KEY}x", 401),
        (f"Bearer {KEY[:-1]}", 401),
        ("Bearer ", 401),
        (KEY, 401),
        ("Bearer schlüssel", 401),
    ],
)
async def test_only_the_key_opens(authorization: str, status: int) -> None:
    headers = httpx.Headers([(b"authorization", authorization.encode())])
    async with client_of(make_app(api_key=KEY)) as client:
        response = await client.get("/v1/models", headers=headers)
    assert response.status_code == status


async def test_a_key_may_have_any_characters() -> None:
    check = KeyCheck("ключ")
    headers = Headers(raw=[(b"authorization", b"Bearer " + "ключ".encode())])
    assert check({}, headers) is None


async def test_a_browser_is_asked_for_the_key_and_a_client_is_told_the_scheme() -> None:
    app = make_app(api_key=KEY)
    assert (await get(app, "/", {})).headers["www-authenticate"].startswith("Basic")
    assert (await get(app, "/v1/models", {})).headers["www-authenticate"] == "Bearer"


async def test_the_key_does_not_show_in_the_settings() -> None:
    assert KEY not in repr(GatewaySettings(api_key=KEY))


async def test_without_a_key_everybody_on_this_machine_gets_in() -> None:
    assert (await get(make_app(), "/v1/models", {})).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"])
async def test_loopback_hosts_are_accepted(host: str) -> None:
    assert (await get(make_app(), "/v1/models", {"Host": host})).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::1", "a:b:c"]
)
async def test_another_host_is_refused(host: str) -> None:
    response = await get(make_app(), "/v1/models", {"Host": host})
    assert response.status_code == 403
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_hosts_can_be_allowed() -> None:
    def accepts(check: HostCheck, host: str) -> bool:
        return check({}, Headers({"host": host})) is None

    check = HostCheck(["chat.example.org:8443", "*.home.arpa", "::2"])
    assert accepts(check, "chat.example.org")
    assert accepts(check, "a.home.arpa:8000")
    assert accepts(check, "[::2]:8000")
    assert not accepts(check, "home.arpa.evil")
    assert accepts(HostCheck(["*"]), "anything")


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost", 200),
        ("https://localhost", 200),  # behind a TLS proxy
        ("http://localhost:9999", 403),
        ("http://evil.example", 403),
        ("https://chat.example.org", 200),
        ("https://chat.example.org.evil.example", 403),
        ("null", 403),
        ("", 403),
    ],
)
async def test_a_page_elsewhere_cannot_drive_this_server(origin: str, status: int) -> None:
    app = make_app(allowed_origins=("https://chat.example.org",))
    assert (await post_chat(app, {"Origin": origin})).status_code == status


async def test_an_allowed_origin_may_read_answers_and_no_other_may() -> None:
    app = make_app(allowed_origins=("https://chat.example.org",), api_key=KEY)
    async with client_of(app) as client:
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        allowed = await client.options("/v1/models", headers={"Origin": "https://chat.example.org", **asked})
        refused = await client.options("/v1/models", headers={"Origin": "https://evil.example", **asked})
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example.org"
    assert "access-control-allow-origin" not in refused.headers


async def test_without_allowed_origins_there_are_no_cors_headers() -> None:
    response = await post_chat(make_app(), {"Origin": "http://localhost"})
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_web_sockets_pass_the_same_checks() -> None:
    app = make_app(api_key=KEY)

    @app.websocket("/ws")
    async def _socket(socket: WebSocket) -> None:
        await socket.accept()
        await socket.close()

    client = TestClient(app, base_url="http://localhost")
    with client.websocket_connect("/ws", headers={**BEARER, "host": "localhost"}):
        pass
    for headers in ({"host": "localhost"}, {**BEARER, "host": "localhost", "origin": "http://evil.example"}):
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/ws", headers=headers):
            pass
