"""What of Gradio the network can reach once the page is mounted, and the headers a browser gets with it."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI

from ui.app import build_page, mount_page

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def mounted() -> FastAPI:
    return asyncio.run(mount())


async def mount() -> FastAPI:
    """Inside an event loop, as the server does it: where there is none, Gradio makes one and never closes it."""
    app = FastAPI(openapi_url=None)

    @app.get("/v1/models")
    async def models() -> dict[str, str]:  # pyright: ignore[reportUnusedFunction]
        return {"object": "list"}

    return mount_page(app, api_base_url="http://127.0.0.1:9")


@pytest.fixture
async def http(mounted: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=mounted)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        yield client


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"),
        ("GET", "/gradio_api/upload_progress?upload_id=x"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("GET", "/gradio_api/info"),
        ("GET", "/gradio_api/openapi.json"),
        ("GET", "/openapi.json"),
        ("GET", "/docs"),
        ("GET", "/redoc"),
        ("GET", "/gradio_api/proxy=https://example.org"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/gradio_api/call/send"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/vibe-edit"),
        ("GET", "/gradio_api/vibe-code"),
        ("GET", "/gradio_api/deep_link?session_hash=x"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/gradio_api/queue/status"),
        ("GET", "/gradio_api/token"),
        ("GET", "/custom_component/x/client/component/style.css"),
        ("GET", "/monitoring"),
        ("POST", "/login"),
        ("GET", "/static/../../routes.py"),
        ("GET", "/static/%2e%2e/%2e%2e/routes.py"),
        ("PUT", "/"),
        ("GET", "/anything"),
    ],
)
async def test_what_the_page_does_not_use_does_not_exist(http: httpx.AsyncClient, method: str, path: str) -> None:
    assert (await http.request(method, path)).status_code in (404, 405)


async def test_the_servers_own_routes_come_first(http: httpx.AsyncClient) -> None:
    assert (await http.get("/v1/models")).json() == {"object": "list"}


async def test_every_script_of_the_page_has_this_responses_nonce(http: httpx.AsyncClient) -> None:
    first, second = await http.get("/"), await http.get("/")
    policy = first.headers["content-security-policy"]
    (nonce,) = re.findall(r"'nonce-([\w-]+)'", policy)
    assert "unsafe-inline" not in policy.split("style-src")[0]
    assert nonce not in second.text
    assert set(re.findall(r"<script([^>]*)", first.text)) == {
        attributes for attributes in re.findall(r"<script([^>]*)", first.text) if f'nonce="{nonce}"' in attributes
    }
    assert first.headers["x-frame-options"] == "DENY"
    assert first.headers["cache-control"] == "no-store"


async def test_the_page_names_no_other_host_but_in_words(http: httpx.AsyncClient) -> None:
    page = (await http.get("/")).text
    loaded = re.findall(r"(?:src|href)=\"(https?://[^\"]+)", page)
    assert loaded == []
    assert "fonts.googleapis" not in page
    assert "fonts.googleapis" not in (await http.get("/theme.css")).text


async def test_a_deep_link_reads_nothing(http: httpx.AsyncClient) -> None:
    page = (await http.get("/", params={"deep_link": "0" * 64})).text
    assert '"deep_link_state":"none"' in page


@pytest.mark.parametrize("path", ["http://127.0.0.1:9/x", "/etc/passwd"])
async def test_an_event_that_names_a_file_is_refused(http: httpx.AsyncClient, path: str) -> None:
    file = {"path": path, "url": None, "meta": {"_type": "gradio.FileData"}}
    event = {"data": [{"conversations": [[file]]}], "fn_index": 1, "session_hash": "x"}
    response = await http.post("/gradio_api/queue/join", json=event)
    assert response.status_code == 400


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000])
async def test_an_event_that_is_no_json_is_refused(http: httpx.AsyncClient, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    assert (await http.post("/gradio_api/queue/join", content=body, headers=headers)).status_code == 400


async def test_the_api_listing_is_empty(http: httpx.AsyncClient) -> None:
    page = (await http.get("/")).text
    (listing,) = re.findall(r"window\.gradio_api_info = (.*?);</script>", page)
    assert '"named_endpoints":{}' in listing


async def test_gradio_measures_nothing_and_reports_nothing() -> None:
    assert build_page("http://127.0.0.1:9").analytics_enabled is False


def test_importing_the_page_loads_no_gradio_until_it_is_built() -> None:
    program = "import sys, ui.app; assert 'gradio' not in sys.modules and 'fastapi' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
