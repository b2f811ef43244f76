"""The composition root and the life of a server: listen, start the engine, answer, drain, leave nothing behind.

Started by `causerie serve`. The order is chosen for a quick start: the engine process loads the model while this
process imports the gateway and the page.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from quant.errors import CheckpointError
from quant.progress import BarProgress, LineProgress, ProgressSink
from serving.config import DirectionConfig, ModerationConfig, ServeConfig
from serving.config_sources import DEFAULT_ORIGIN, LoadedConfig, is_loopback
from serving.engine.client import EngineClient
from serving.engine.wire import EngineSettings
from serving.gateway.ports import (
    DirectionRules,
    GatewaySettings,
    ModerationRules,
    Preparation,
    Readiness,
    RequestLimits,
    ServedModel,
)
from serving.listening import base_url, open_listener
from serving.log import configure_logging
from serving.metrics import Metrics
from serving.model_sources import SourceUnavailableError
from serving.models import RELEASED_MODEL, resolve
from serving.preparation_child import find_prepared, find_source, prepare_in_child
from serving.quality_limit import check_quality

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

__all__ = ["engine_settings", "gateway_settings", "model_to_serve", "moderation_rules", "run_server"]

logger = logging.getLogger(__name__)

# How long answers that the engine has finished may take to reach their clients.
_LAST_BYTES_S = 1
_NO_TELEMETRY = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "DO_NOT_TRACK": "1",
}
# Imported in a thread while the engine loads; each takes seconds or pulls in what does.
_SLOW_IMPORTS = ("moderation.policy", "serving.gateway.app", "serving.served_model", "uvicorn", "gradio", "ui.page")


def run_server(loaded: LoadedConfig) -> int:
    """Serves until SIGINT or SIGTERM. Returns the exit code; raises what stops a start, for the command to print."""
    started = time.monotonic()
    os.environ.update(_NO_TELEMETRY)
    config = loaded.config
    resolve(config.model)  # a mistyped name is known at once
    configure_logging(config.log_format, logging.getLevelNamesMapping()[config.log_level.upper()])
    with open_listener(config.host, config.port) as listener:
        return asyncio.run(Server(loaded, listener, started).run())


class Server:
    """One server from its first to its last moment."""

    def __init__(self, loaded: LoadedConfig, listener: socket.socket, started: float) -> None:
        self._loaded = loaded
        self._config = loaded.config
        self._listener = listener
        self._started = started
        self._url = base_url(self._config.host, listener.getsockname()[1])
        self._metrics = Metrics()
        self._engine = EngineClient(
            engine_settings(self._config),
            stall_after_s=self._config.stall_after_s,
            on_freed=self._metrics.observe_freed,
        )
        self._readiness = Readiness(engine=self._engine)
        self._stop = asyncio.Event()
        self._http: uvicorn.Server | None = None

    async def run(self) -> int:
        self._stop_on_signals()
        self._announce_addresses()
        bringing_up = asyncio.create_task(self._bring_up(), name="bring-up")
        bringing_up.add_done_callback(self._note_failure)
        try:
            serving = asyncio.create_task(self._serve_http(), name="http")
            stopping = asyncio.create_task(self._stop.wait())
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await self._engine.drain(self._config.shutdown_grace_s)
        finally:
            bringing_up.cancel()
            await asyncio.gather(bringing_up, return_exceptions=True)
            await self._engine.close()
        # What is still open are pages that wait for events; uvicorn would report each as an error.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        if self._http is not None:
            self._http.should_exit = True
        stopping.cancel()
        await serving
        logger.info("server_stopped")
        if not bringing_up.cancelled() and (error := bringing_up.exception()) is not None:
            raise error
        return 0

    async def _bring_up(self) -> None:
        """Prepared model, engine, tokenizer: after this, requests are answered."""
        model, directory = await model_to_serve(self._loaded, self._prepared_directory)
        summary = await asyncio.to_thread(check_quality, directory, self._config.min_top1_agreement)
        self._announce_quality(summary)
        model_id, texts = await self._start_engine(model, directory)
        assert self._engine.max_context is not None
        self._readiness.model = texts.served_as(model_id, self._engine.max_context)
        self._readiness.preparation = None
        gc.collect()
        gc.freeze()  # what is loaded stays: later collections need not walk it
        self._announce_ready(self._readiness.model)

    async def _prepared_directory(self, model: str) -> Path:
        is_plain = self._config.load_in is not None
        found = await asyncio.to_thread(find_source if is_plain else find_prepared, model)
        if found is not None:
            return found
        self._readiness.preparation = Preparation(stage="Starting")
        with contextlib.ExitStack() as stack:
            shown: ProgressSink = stack.enter_context(BarProgress()) if sys.stderr.isatty() else LineProgress()
            return await prepare_in_child(model, _ProgressToPage(self._readiness, shown), is_plain=is_plain)

    async def _start_engine(self, model: str, directory: Path):  # noqa: ANN202 - the type is imported late
        def load_texts():  # noqa: ANN202
            from serving.served_model import load_texts, model_id_of

            return model_id_of(model), load_texts(directory)

        self._readiness.preparation = Preparation(stage="Loading the model")
        _, loaded = await asyncio.gather(self._engine.start(directory), asyncio.to_thread(load_texts))
        return loaded

    async def _serve_http(self) -> None:
        await asyncio.to_thread(_import_all, _SLOW_IMPORTS)
        import uvicorn

        class _Http(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self):  # noqa: ANN202 - signals are this module's
                yield

        self._http = _Http(
            uvicorn.Config(
                self._build_app(),
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=_LAST_BYTES_S,
            )
        )
        self._http.should_exit = self._stop.is_set()
        await self._http.serve(sockets=[self._listener])

    def _build_app(self) -> FastAPI:
        from serving.gateway.app import build_app
        from serving.gateway.ports import Services
        from ui.app import mount_page

        rules = moderation_rules(self._config.moderation)
        services = Services(
            settings=gateway_settings(self._loaded),
            engine=self._engine,
            readiness=self._readiness,
            rules_of_key=lambda _key_name: rules,  # there is one key or none, so one policy
            metrics=self._metrics,
        )
        return mount_page(build_app(services), api_base_url=self._url)

    def _stop_on_signals(self) -> None:
        """The first signal drains; a second one does not wait."""

        def on_signal() -> None:
            if self._stop.is_set() and self._http is not None:
                self._http.force_exit = True
                self._engine.abandon("the server was told to stop at once")
            self._stop.set()

        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, on_signal)

    def _note_failure(self, bringing_up: asyncio.Task[None]) -> None:
        if bringing_up.cancelled() or bringing_up.exception() is None:
            return
        self._readiness.failure = str(bringing_up.exception())
        self._stop.set()

    def _announce_addresses(self) -> None:
        print(f"chat page  {self._url}/\nAPI        {self._url}/v1", flush=True)

    def _announce_quality(self, summary: str | None) -> None:
        load_in = self._config.load_in
        if load_in is not None:
            print(f"weights rounded to {load_in} while loading; what that costs was not measured", flush=True)
        elif summary is not None:
            print(f"quantised: {summary}", flush=True)

    def _announce_ready(self, model: ServedModel) -> None:
        seconds = time.monotonic() - self._started
        print(f"ready after {seconds:.1f} s: {model.model_id}, context {model.max_context:,} tokens", flush=True)
        logger.info("server_ready model=%s url=%s seconds=%.2f", model.model_id, self._url, seconds)


class _ProgressToPage:
    """Shows progress to whoever started the server and to whoever opens the page."""

    def __init__(self, readiness: Readiness, shown: ProgressSink) -> None:
        self._readiness = readiness
        self._shown = shown

    def update(self, stage: str, done: float, total: float) -> None:
        self._readiness.preparation = Preparation(stage, done, total)
        self._shown.update(stage, done, total)


def engine_settings(config: ServeConfig) -> EngineSettings:
    return EngineSettings(
        directory="",  # given to EngineClient.start, once it is known
        kv_bytes=config.kv_memory_bytes,
        exact=config.exact,
        prefix_cache=config.prefix_cache,
        prompt_lookup=config.speculative == "prompt-lookup",
        int8_kv=config.kv_cache_dtype == "int8",
        load_in=config.load_in,
        max_running=config.limits.max_running,
        max_waiting=config.limits.max_waiting,
        max_step_tokens=config.prefill_chunk_tokens,
        prefill_slowdown=config.prefill_slowdown,
        compute_threads=config.compute_threads,
        log_format=config.log_format,
        log_level=logging.getLevelNamesMapping()[config.log_level.upper()],
    )


def moderation_rules(config: ModerationConfig) -> ModerationRules:
    """What is in force, with the classifier loaded. Raises ModerationError: a server without one does not start."""
    from threadpoolctl import threadpool_limits

    from moderation.policy import PolicyOptions, Sensitivity, load_policy

    # The classifier's products are small, and the cores are the engine's.
    threadpool_limits(limits=1, user_api="blas")

    def sensitivity(direction: DirectionConfig) -> Sensitivity:
        preset = None if direction.preset == "none" else direction.preset
        return Sensitivity(preset, config.threshold, direction.thresholds)

    options = PolicyOptions(input=sensitivity(config.input), output=sensitivity(config.output))
    return ModerationRules(
        policy=load_policy(options=options),
        input=DirectionRules(config.input.mode, config.input.fail),
        output=DirectionRules(config.output.mode, config.output.fail),
        on_flagged=config.on_flagged,
        message=config.message,
        records_text=config.record_text,
    )


def gateway_settings(loaded: LoadedConfig) -> GatewaySettings:
    config, limits = loaded.config, loaded.config.limits
    own_name = () if is_loopback(config.host) else (config.host,)
    return GatewaySettings(
        api_key=loaded.api_key,
        allowed_hosts=(*config.allowed_hosts, *own_name),
        allowed_origins=config.allowed_origins,
        limits=RequestLimits(
            max_body_bytes=limits.max_body_bytes,
            max_messages=limits.max_messages,
            max_choices=limits.max_choices,
            max_stop=limits.max_stop,
            max_stop_length=limits.max_stop_length,
            max_tokens=limits.max_tokens,
        ),
        shares_prefix_cache=config.share_prefix_cache,
        stall_after_s=config.stall_after_s,
    )


async def model_to_serve(loaded: LoadedConfig, prepare: Callable[[str], Awaitable[Path]]) -> tuple[str, Path]:
    """The model to serve and its directory, made by `prepare` if need be.

    Where the default model cannot be fetched, the one that comes with the installation takes its place, and a line
    says so. Who named a model gets that one or its error.
    """
    model = loaded.config.model
    try:
        return model, await prepare(model)
    except SourceUnavailableError as unavailable:
        released = None
        # What comes with the installation is quantised: it cannot be rounded another way.
        if loaded.origins["model"] == DEFAULT_ORIGIN and loaded.config.load_in is None:
            released = await asyncio.to_thread(_find_released)
        if released is None:
            raise
        print(f"serving {RELEASED_MODEL}, which comes with causerie, instead of {model}: {unavailable}", flush=True)
        return RELEASED_MODEL, released


def _find_released() -> Path | None:
    """None where the installation lacks it: then the reason why the default model is not there counts."""
    try:
        return find_prepared(RELEASED_MODEL)
    except CheckpointError:
        return None


def _import_all(modules: tuple[str, ...]) -> None:
    for module in modules:
        importlib.import_module(module)
