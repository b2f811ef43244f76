"""A headless Chromium for the page's tests, found on the machine and never downloaded, and a watch on what it does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

WAIT_MS = 20_000

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM_ARGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_chromium() -> str | None:
    named = os.environ.get("CAUSERIE_CHROMIUM")
    return named or next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)


@dataclass
class Watcher:
    """What must never happen on this page, collected while a test runs."""

    own_url: str
    foreign_requests: list[str] = field(default_factory=list[str])
    script_errors: list[str] = field(default_factory=list[str])

    def watch(self, page: Page) -> None:
        page.on("request", self._on_request)
        page.on("pageerror", lambda error: self._on_script_error(str(error)))
        page.on("console", self._on_console)

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith((self.own_url, "data:", "blob:")):
            self.foreign_requests.append(request.url)

    def _on_script_error(self, text: str) -> None:
        # Gradio's client says so when a page is left or reloaded while it still listens.
        if "AbortError" not in text and "Connection errored out" not in text:
            self.script_errors.append(text)

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self._on_script_error(message.text)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium: set CAUSERIE_CHROMIUM or install chromium")
    expect.set_options(timeout=WAIT_MS)
    # Per module, not per session: while it runs, its event loop is the main thread's, and async tests need their own.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(CHROMIUM_ARGS))
        yield browser
        browser.close()
