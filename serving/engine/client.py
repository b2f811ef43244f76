"""The gateway's side of the engine process: starts it, watches it, restarts it, and streams its events.

One message per engine step is fanned out to the open requests with plain queue appends: no task, no lock per token.
It lives on one asyncio event loop and is called from that loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from enum import StrEnum
from pathlib import Path

import msgspec

from quant.errors import CheckpointError
from serving.engine.child import EngineChild
from serving.engine.requests import (
    CancelRequest,
    EngineEvent,
    EngineRequest,
    EngineStats,
    GenerateRequest,
    StepReport,
    TokenEvent,
)
from serving.engine.wire import EngineSettings, Fatal, FromEngine, Heartbeat, Ready, Stepped
from serving.errors import EngineStopped, QueueFull

__all__ = ["EngineClient", "EngineState", "EventStream"]

logger = logging.getLogger(__name__)

_RESTART_RETRY_AFTER_S = 5
_LONGEST_RETRY_AFTER_S = 60
_MAX_BACKOFF_S = 30.0
_FAILED_AFTER_STARTS = 5


class EngineState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"  # finishes what it has, takes nothing new
    FAILED = "failed"  # several starts in a row failed; still tried again, every 30 s
    CLOSED = "closed"


class EventStream(AsyncIterator[EngineEvent]):
    """The events of one request. Ends after its terminal event; `aclose` before that cancels it in the engine."""

    def __init__(self, request_id: str, num_choices: int, on_close: Callable[[EventStream], None]) -> None:
        self.request_id = request_id
        self.num_choices = num_choices
        self.num_open_choices = num_choices
        self._events: deque[EngineEvent] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._error: EngineStopped | None = None
        self._on_close = on_close

    @property
    def is_finished(self) -> bool:
        """All of its events have arrived (they may not have been read yet)."""
        return self.num_open_choices == 0 or self._error is not None

    def push(self, event: EngineEvent) -> None:
        self._events.append(event)
        if not isinstance(event, TokenEvent):
            self.num_open_choices = 0
        elif event.finish_reason is not None:
            self.num_open_choices -= 1
        self._wake()

    def fail(self, error: EngineStopped) -> None:
        """Raised to the reader after the events that did arrive."""
        self._error = error
        self._wake()

    async def __anext__(self) -> EngineEvent:
        while not self._events:
            if self._error is not None:
                raise self._error
            if self.is_finished:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._events.popleft()

    async def aclose(self) -> None:
        self._events.clear()
        self._on_close(self)
        self.num_open_choices = 0
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineClient:
    """Supervises one engine process at a time. `on_freed` gets the seconds from a cancellation to its freed cache."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        stall_after_s: float = 60.0,
        on_freed: Callable[[float], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state = EngineState.STARTING
        self.stats: EngineStats | None = None
        self.max_context: int | None = None
        self.kernel: str | None = None
        self.pid: int | None = None
        self.num_restarts = 0
        self._settings = settings
        self._stall_after_s = stall_after_s
        self._on_freed = on_freed
        self._clock = clock
        self._streams: dict[str, EventStream] = {}
        self._cancelled_at: dict[str, float] = {}  # hung up, cache not yet reported free
        self._finish_times: deque[float] = deque(maxlen=32)
        self._progress_at = 0.0
        self._child: EngineChild | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._first_start: asyncio.Future[None] | None = None
        self._drained = asyncio.Event()  # set when the last stream ends while draining

    async def start(self, directory: Path) -> None:
        """Starts the process and returns when it answers. CheckpointError: the model cannot be served."""
        self._settings = msgspec.structs.replace(self._settings, directory=str(directory))
        self._first_start = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")
        try:
            await self._first_start
        except BaseException:
            await self.close()
            self.state = EngineState.FAILED
            raise

    async def drain(self, timeout_s: float) -> None:
        """Takes nothing new and returns when the open requests are done, at the latest after `timeout_s`."""
        if self.state is not EngineState.READY:
            return
        self.state = EngineState.DRAINING
        self._drained.clear()
        if self._streams:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), timeout_s)

    def abandon(self, message: str) -> None:
        """Ends every open iterator with EngineStopped, now."""
        self._fail_streams(message)

    async def close(self) -> None:
        """Ends the process. Open iterators raise EngineStopped."""
        if self._supervisor is None:
            self.state = EngineState.CLOSED
            return
        supervisor, self._supervisor = self._supervisor, None
        supervisor.cancel()
        await asyncio.gather(supervisor, return_exceptions=True)
        self.state = EngineState.CLOSED
        self._fail_streams("the server is shutting down")

    def submit(self, request: EngineRequest) -> EventStream:
        """Sends the request and returns its events. Raises QueueFull, or EngineStopped when no engine is ready."""
        child = self._child
        if self.state is not EngineState.READY or child is None:
            raise self._not_ready()
        if request.request_id in self._streams:
            raise ValueError(f"request id {request.request_id!r} is in use")
        num_choices = request.num_choices if isinstance(request, GenerateRequest) else 1
        self._check_queue(num_choices)
        if self.seconds_since_progress() is None:
            self._progress_at = self._clock()
        stream = EventStream(request.request_id, num_choices, self._close_stream)
        if not child.send(request):
            raise self._not_ready()
        self._streams[request.request_id] = stream
        return stream

    async def cancel(self, request_id: str, choice_index: int | None = None) -> bool:
        """Asks the engine to end a request; its stream ends with `finish_reason="cancelled"`. False: not open here."""
        stream = self._streams.get(request_id)
        if stream is None or self._child is None:
            return False
        if choice_index is None:
            self._cancelled_at.setdefault(request_id, self._clock())
        return self._child.send(CancelRequest(request_id=request_id, choice_index=choice_index))

    def seconds_since_progress(self) -> float | None:
        """Seconds without a completed step while requests are open; None when nothing is queued."""
        if not self._streams and not self._cancelled_at:
            return None
        return self._clock() - self._progress_at

    def _check_queue(self, num_choices: int) -> None:
        num_open = sum(stream.num_open_choices for stream in self._streams.values())
        num_places = self._settings.max_running
        if self.stats is not None and self.stats.num_waiting > self.stats.num_awaiting_turn:
            num_places = self.stats.num_running  # something waits for room, so the cache is full
        num_waiting = max(0, num_open - num_places)
        if num_open >= num_places and num_waiting + num_choices > self._settings.max_waiting:
            raise QueueFull(
                f"{num_waiting} sequences are waiting; this server queues at most {self._settings.max_waiting}",
                retry_after_s=self._estimate_place_s(),
            )

    def _estimate_place_s(self) -> int:
        """Seconds until one waiting sequence has moved up, from how fast the last ones finished."""
        now = self._clock()
        recent = [finished_at for finished_at in self._finish_times if now - finished_at < _LONGEST_RETRY_AFTER_S]
        if not recent:
            return 1
        return max(1, round((now - recent[0]) / len(recent)))

    def _close_stream(self, stream: EventStream) -> None:
        """The reader has left. What the engine still does for it stops at the next step."""
        if self._streams.get(stream.request_id) is not stream:
            return
        del self._streams[stream.request_id]
        if not self._streams:
            self._drained.set()
        if not stream.is_finished and self._child is not None:
            self._cancelled_at.setdefault(stream.request_id, self._clock())
            self._child.send(CancelRequest(request_id=stream.request_id))

    def _not_ready(self) -> EngineStopped:
        return EngineStopped(f"the engine is {self.state.value}; try again later", retry_after_s=_RESTART_RETRY_AFTER_S)

    def _receive(self, message: FromEngine) -> None:
        if isinstance(message, Stepped):
            self._receive_step(message.report)
        elif isinstance(message, Heartbeat):
            self._receive_stats(message.stats)
        elif isinstance(message, Ready):
            self._receive_ready(message)

    def _receive_ready(self, ready: Ready) -> None:
        self.max_context = ready.max_context
        self.kernel = ready.kernel
        self.stats = ready.stats
        self.state = EngineState.READY
        logger.info(
            "engine_ready pid=%s max_context=%d kv_blocks=%d kernel=%s load_s=%.2f",
            self.pid,
            ready.max_context,
            ready.stats.num_total_blocks,
            ready.kernel,
            ready.load_seconds,
        )
        if self._first_start is not None and not self._first_start.done():
            self._first_start.set_result(None)

    def _receive_step(self, report: StepReport) -> None:
        self._progress_at = self._clock()
        for event in report.events:
            stream = self._streams.get(event.request_id)
            if stream is None:
                continue  # the reader has left
            stream.push(event)
            if stream.is_finished:
                del self._streams[event.request_id]
                self._finish_times.append(self._progress_at)
        self._receive_stats(report.stats)
        if self._cancelled_at:
            self._forget_ended(report)
        if not self._streams:
            self._drained.set()

    def _receive_stats(self, stats: EngineStats) -> None:
        self.stats = stats
        for request_id in stats.freed_request_ids:
            cancelled_at = self._cancelled_at.pop(request_id, None)
            if cancelled_at is not None and self._on_freed is not None:
                self._on_freed(self._clock() - cancelled_at)

    def _forget_ended(self, report: StepReport) -> None:
        """A request that ended by itself before its cancellation arrived is not reported as freed."""
        for event in report.events:
            if not isinstance(event, TokenEvent) or event.finish_reason is not None:
                self._cancelled_at.pop(event.request_id, None)

    def _fail_streams(self, message: str) -> None:
        streams, self._streams = self._streams, {}
        self._cancelled_at.clear()
        for stream in streams.values():
            stream.fail(EngineStopped(message, retry_after_s=_RESTART_RETRY_AFTER_S))
        self._drained.set()

    async def _supervise(self) -> None:
        """Keeps one process alive. A first start that fails is the caller's error; later ones are tried again."""
        num_failed_starts = 0
        while True:
            was_ready, reason = await self._run_child()
            if self._first_start is not None and not self._first_start.done():
                self._first_start.set_exception(reason)
                return
            num_failed_starts = 0 if was_ready else num_failed_starts + 1
            gave_up = num_failed_starts >= _FAILED_AFTER_STARTS
            self.state = EngineState.FAILED if gave_up else EngineState.RESTARTING
            self._fail_streams(f"{reason}; it is being restarted")
            self.num_restarts += 1
            delay_s = 0.0 if num_failed_starts == 0 else min(_MAX_BACKOFF_S, 0.5 * 2**num_failed_starts)
            logger.error("engine_restart reason=%r delay_s=%.1f restarts=%d", str(reason), delay_s, self.num_restarts)
            await asyncio.sleep(delay_s)

    async def _run_child(self) -> tuple[bool, CheckpointError | EngineStopped]:
        """One life of one process: whether it came to answer, and why it ended."""
        fatal: Fatal | None = None

        def receive(message: FromEngine) -> None:
            nonlocal fatal
            if isinstance(message, Fatal):
                fatal = message
            else:
                self._receive(message)

        try:
            child = await EngineChild.spawn(self._settings, receive)
        except OSError as error:
            return False, EngineStopped(f"the engine process could not be started: {error}")
        self._child, self.pid = child, child.pid
        stalled = was_ready = False
        try:
            stalled = await self._watch(child)
        finally:
            self._child, self.pid = None, None
            was_ready = self.state is EngineState.READY
            if was_ready:
                self.state = EngineState.RESTARTING
            await child.end(is_hung=stalled)
        if stalled:
            return was_ready, EngineStopped(f"the engine made no progress for {self._stall_after_s:g} s")
        if fatal is not None and fatal.kind == "checkpoint":
            return was_ready, CheckpointError(fatal.message)
        return was_ready, EngineStopped(fatal.message if fatal is not None else child.describe_exit())

    async def _watch(self, child: EngineChild) -> bool:
        """Returns when the process has ended (False) or hangs (True)."""
        interval_s = min(1.0, self._stall_after_s / 4)
        while not await child.has_ended_within(interval_s):
            child.drain()  # a step that waited for a busy event loop is progress too
            idle_s = self.seconds_since_progress() if self.state is EngineState.READY else None
            if idle_s is not None and idle_s > self._stall_after_s:
                logger.error("engine_stalled pid=%d seconds_since_progress=%.1f", child.pid, idle_s)
                return True
        return False
