"""Mounts the chat page on a FastAPI app: Gradio's uploads, file serving, API listing and telemetry are off.

Gradio takes seconds to import, so it is imported when a page is built, not with this module. Called by the server's
composition root and by tests.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

__all__ = ["build_page", "mount_page"]

# How often Gradio looks for new events while nothing happens. Its default wakes the processor 1,000 times a second.
IDLE_POLL_S = 0.01
# Each answer that streams is one, and a Stop must always find room. Gradio's default is 40.
MAX_RUNNING_EVENTS = 1000


def build_page(api_base_url: str) -> gr.Blocks:
    """`api_base_url`: the address of the public API without `/v1`, as reached from this process."""
    from ui.client import ApiClient
    from ui.page import build_page as build

    return build(ApiClient(api_base_url))


def mount_page(app: FastAPI, *, api_base_url: str) -> FastAPI:
    """Mounts the page at "/", after the routes `app` already has. Whoever may open it is up to `app`'s middleware."""
    import gradio as gr
    from starlette.middleware import Middleware

    from ui.guard import PageGuard
    from ui.layout import favicon_path, page_css, page_script, page_theme

    page = build_page(api_base_url)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        app_kwargs={"middleware": [Middleware(PageGuard, script=page_script())], "openapi_url": None},
        footer_links=[],
        run_history=False,
        favicon_path=str(favicon_path()),
        allowed_paths=[],
        show_error=False,
        max_file_size=0,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=page_theme(),
        css=page_css(),
    )
    _tune_queue(page)
    return app


def _tune_queue(page: gr.Blocks) -> None:
    """Gradio's queue keeps figures on every event and sums them up after each one; nobody reads them here."""
    queue = page._queue
    queue.sleep_when_free = IDLE_POLL_S
    queue.progress_update_sleep_when_free = 1.0  # the page has no progress bars of Gradio's
    queue.max_thread_count = MAX_RUNNING_EVENTS
    queue.ANALYTICS_MAX_EVENTS = 1
    queue.ANAYLTICS_CACHE_FREQUENCY = sys.maxsize  # Gradio's spelling
