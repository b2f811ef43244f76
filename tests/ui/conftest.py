"""A page on a scripted server and a real browser to look at it; each test gets a browser that was never here before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from playwright.sync_api import Browser, Page

from tests.ui.browser import WAIT_MS, Watcher, browser
from tests.ui.scripted_api import ScriptedApi, ServerThread, free_port
from ui.app import mount_page

__all__ = ["Site", "browser"]


@dataclass
class Site:
    url: str
    api: ScriptedApi


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
