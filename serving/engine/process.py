"""The engine process: loads one model and turns requests from its inbox into step reports until its parent is gone.

Started by `serving.engine.client` as `python -P -m serving.engine.process SETTINGS SOCKET_DIRECTORY PARENT_PID`, never
forked. It imports neither the gateway nor the page nor moderation: its memory is the model's.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import msgspec
import zmq

from quant.errors import CheckpointError
from serving.engine.requests import CancelRequest, EngineRequest, EngineStats, FailedEvent, StepReport
from serving.engine.wire import (
    EngineSettings,
    Fatal,
    FromEngine,
    Heartbeat,
    Ready,
    Shutdown,
    Stepped,
    ToProcess,
    decode_to_process,
    encode,
    inbox_address,
    outbox_address,
)
from serving.errors import ServiceError
from serving.log import LogFormat, configure_logging

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["EngineLike", "load_default_engine", "main", "serve_engine"]

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


class EngineLike(Protocol):
    """What this process needs of `serving.engine.engine.Engine`."""

    @property
    def max_context(self) -> int: ...
    @property
    def kernel_name(self) -> str: ...
    @property
    def has_work(self) -> bool: ...
    def submit(self, request: EngineRequest) -> None: ...
    def cancel(self, request: CancelRequest) -> None: ...
    def step(self) -> StepReport: ...
    def stats(self) -> EngineStats: ...


class GatewayLink:
    """Both sockets of the engine process. It connects; the gateway binds, so a restart finds fresh addresses."""

    def __init__(self, directory: Path) -> None:
        self._context = zmq.Context(io_threads=1)
        self._inbox = self._connect(zmq.PULL, inbox_address(directory))
        self._outbox = self._connect(zmq.PUSH, outbox_address(directory))

    def _connect(self, kind: int, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set_hwm(0)  # the client bounds the queue; a bound here would block the step loop
        socket.connect(address)
        return socket

    def send(self, message: FromEngine) -> None:
        self._outbox.send(encode(message))

    def received(self) -> Iterator[ToProcess]:
        """What has arrived, without waiting."""
        while True:
            try:
                frame = self._inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield decode_to_process(frame)

    def wait(self, timeout_s: float) -> None:
        """Sleeps until something arrives."""
        self._inbox.poll(int(timeout_s * 1000))

    def close(self) -> None:
        self._context.destroy(linger=1000)


def main(argv: Sequence[str]) -> int:
    settings = msgspec.json.decode(argv[0], type=EngineSettings)
    die_with_parent(int(argv[2]))
    configure_logging(LogFormat(settings.log_format), settings.log_level)
    link = GatewayLink(Path(argv[1]))
    try:
        return serve_engine(settings, link)
    finally:
        link.close()


def serve_engine(settings: EngineSettings, link: GatewayLink) -> int:
    """Load, announce, run. Returns the exit code: 0 asked to leave, 1 the engine failed."""
    started = time.monotonic()
    try:
        engine = _factory(settings)(settings)
    except CheckpointError as error:
        return _give_up(link, "checkpoint", str(error))
    except Exception as error:
        logger.exception("engine_load_failed directory=%s", settings.directory)
        return _give_up(link, "internal", f"the engine could not load the model: {type(error).__name__}: {error}")
    load_seconds = time.monotonic() - started
    link.send(
        Ready(
            max_context=engine.max_context,
            stats=engine.stats(),
            load_seconds=load_seconds,
            kernel=engine.kernel_name,
        )
    )
    try:
        run_steps(engine, link, settings.heartbeat_s)
    except Exception as error:
        logger.exception("engine_failed")
        return _give_up(link, "internal", f"the engine failed: {type(error).__name__}: {error}")
    return 0


def run_steps(engine: EngineLike, link: GatewayLink, heartbeat_s: float) -> None:
    """The loop: take what arrived, do one step, report it; sleep on the socket when there is nothing to do."""
    last_sent = time.monotonic()
    while True:
        for message in link.received():
            if isinstance(message, Shutdown):
                return
            if (refusal := _deliver(engine, message)) is not None:
                link.send(Stepped(StepReport(events=[refusal], stats=engine.stats())))
        if engine.has_work:
            link.send(Stepped(engine.step()))
            last_sent = time.monotonic()
            continue
        if time.monotonic() - last_sent >= heartbeat_s:
            link.send(Heartbeat(stats=engine.stats()))
            last_sent = time.monotonic()
        link.wait(heartbeat_s)


def _deliver(engine: EngineLike, message: EngineRequest | CancelRequest) -> FailedEvent | None:
    """Hands one message to the engine; a request it refuses is answered, never dropped."""
    if isinstance(message, CancelRequest):
        engine.cancel(message)
        return None
    try:
        engine.submit(message)
    except ServiceError as error:
        code = error.code or error.kind
        return FailedEvent(request_id=message.request_id, code=code, message=error.message)
    return None


def _give_up(link: GatewayLink, kind: str, message: str) -> int:
    link.send(Fatal(kind="checkpoint" if kind == "checkpoint" else "internal", message=message))
    return 1


def _factory(settings: EngineSettings) -> Callable[[EngineSettings], EngineLike]:
    if settings.factory is None:
        return load_default_engine
    module, _, name = settings.factory.partition(":")
    return cast("Callable[[EngineSettings], EngineLike]", getattr(importlib.import_module(module), name))


def load_default_engine(settings: EngineSettings) -> EngineLike:
    """The real engine. torch is imported here, after the thread settings are in the environment."""
    import torch

    from quant.bitsandbytes_linear import LoadIn
    from serving.engine.engine import EngineLimits
    from serving.engine.load import load_engine

    num_threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads()
    # One core stays free for the gateway, which imports the page meanwhile: loading is many small operations, and
    # their workers would wait for each other more than they work (measured: 5 s instead of 2 s on two busy cores).
    torch.set_num_threads(max(1, num_threads - 1))
    limits = EngineLimits(
        max_running=settings.max_running,
        max_waiting=settings.max_waiting + settings.max_running,  # the client refuses first, and knows Retry-After
        max_step_tokens=settings.max_step_tokens,
        prefill_slowdown=settings.prefill_slowdown,
    )
    engine = load_engine(
        Path(settings.directory),
        kv_bytes=settings.kv_bytes,
        exact=settings.exact,
        limits=limits,
        prefix_cache=settings.prefix_cache,
        prompt_lookup=settings.prompt_lookup,
        int8_kv=settings.int8_kv,
        load_in=None if settings.load_in is None else LoadIn(settings.load_in),
    )
    torch.set_num_threads(num_threads)
    gc.collect()
    gc.freeze()  # what is loaded stays: walking it took a fortieth of a decoding step
    return engine


def die_with_parent(parent_pid: int) -> None:
    """Makes this process end with its parent, also with a killed one.

    Linux kills it by signal. Everywhere, standard input is a pipe whose other end only the parent holds: when that
    closes, a thread leaves. The parent may already be gone before either is set, so its pid is checked last.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_leave_at_end_of_input, name="parent-watch", daemon=True).start()
    if os.getppid() != parent_pid:
        os._exit(1)


def _leave_at_end_of_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
