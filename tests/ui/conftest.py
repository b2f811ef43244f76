"""A page on a scripted server and a real browser to look at it; each test gets a browser that was never here before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

from tests.ui.browser import CHROMIUM_ARGS, find_chromium
from tests.ui.scripted_api import ScriptedApi, ServerThread, free_port
from ui.app import mount_page

WAIT_MS = 20_000


@dataclass
class Site:
    url: str
    api: ScriptedApi


@dataclass
class Watcher:
    """What must never happen on this page, collected while a test runs."""

    own_url: str
    foreign_requests: list[str] = field(default_factory=list[str])
    script_errors: list[str] = field(default_factory=list[str])

    def watch(self, page: Page) -> None:
        page.on("request", self._on_request)
        page.on("pageerror", lambda error: self.script_errors.append(str(error)))
        page.on("console", self._on_console)

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith((self.own_url, "data:", "blob:")):
            self.foreign_requests.append(request.url)

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.script_errors.append(message.text)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium: set CAUSERIE_CHROMIUM or install chromium")
    # Per module, not per session: while it runs, its event loop is the main thread's, and async tests need their own.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(CHROMIUM_ARGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def running_site() -> Iterator[Site]:
    api, port = ScriptedApi(), free_port()
    mount_page(api.app, api_base_url=f"http://127.0.0.1:{port}")
    with ServerThread(api.app, port):
        yield Site(f"http://127.0.0.1:{port}", api)


@pytest.fixture
def site(running_site: Site) -> Site:
    running_site.api.forget()
    return running_site


@pytest.fixture
def api(site: Site) -> ScriptedApi:
    return site.api


@pytest.fixture
def watcher(site: Site) -> Iterator[Watcher]:
    watcher = Watcher(site.url)
    yield watcher
    assert watcher.foreign_requests == []
    assert watcher.script_errors == []


@pytest.fixture
def page(browser: Browser, site: Site, watcher: Watcher) -> Iterator[Page]:
    """The page, opened, wide; the server is ready unless the test says otherwise before it uses this."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    watcher.watch(page)
    page.goto(site.url)
    yield page
    context.close()
