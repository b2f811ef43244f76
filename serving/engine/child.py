"""One life of the engine process as the gateway sees it: a subprocess and two sockets in a private directory.

`serving.engine.client` decides when one is started and what to do when it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from serving.child_process import child_environment, python_command
from serving.engine.cpu import thread_environment
from serving.engine.wire import (
    EngineSettings,
    FromEngine,
    Shutdown,
    ToProcess,
    decode_from_engine,
    encode,
    inbox_address,
    outbox_address,
)

__all__ = ["EngineChild"]

_PREFIX = "causerie-engine-"
_LONGEST_PARENT = 65  # a Unix socket's name has about 100 bytes
_LAST_WORDS_S = 0.05


class EngineChild:
    """Calls `receive` with each message, on the event loop it was spawned on."""

    def __init__(self, directory: Path, receive: Callable[[FromEngine], None]) -> None:
        self._directory = directory
        self._receive = receive
        self._context = zmq.Context(io_threads=1)
        self._to_engine = self._bind(zmq.PUSH, inbox_address(directory))
        self._from_engine = self._bind(zmq.PULL, outbox_address(directory))
        self._loop = asyncio.get_running_loop()
        self._process: asyncio.subprocess.Process | None = None
        self._ended: asyncio.Task[int] | None = None

    @classmethod
    async def spawn(cls, settings: EngineSettings, receive: Callable[[FromEngine], None]) -> EngineChild:
        child = cls(_private_directory(), receive)
        try:
            child._process = await asyncio.create_subprocess_exec(
                *python_command(
                    "serving.engine.process",
                    *(msgspec.json.encode(settings).decode(), str(child._directory), str(os.getpid())),
                ),
                stdin=asyncio.subprocess.PIPE,  # the child leaves when the other end closes
                stdout=asyncio.subprocess.DEVNULL,  # it logs to stderr; stdout belongs to the command
                env=child_environment(os.environ) | thread_environment(settings.compute_threads, os.environ),
                start_new_session=True,  # Ctrl-C is the gateway's: it drains first
            )
        except BaseException:
            child._close_sockets()
            raise
        child._ended = asyncio.create_task(child._process.wait())
        # Only now: a quick child may have sent already, and the caller must hold it before its messages arrive.
        child._loop.add_reader(child._from_engine.fileno(), child.drain)
        child._loop.call_soon(child.drain)
        return child

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def send(self, message: ToProcess) -> bool:
        """False when there is no process to take it."""
        try:
            self._to_engine.send(encode(message), zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    async def has_ended_within(self, timeout_s: float) -> bool:
        assert self._ended is not None
        done, _ = await asyncio.wait({self._ended}, timeout=timeout_s)
        return bool(done)

    async def end(self, *, is_hung: bool = False) -> None:
        """Asks (a hung one is not asked), then kills, then reads what had still been sent."""
        try:
            was_asked = not is_hung and self.send(Shutdown())
            if not was_asked or not await self.has_ended_within(1.0):
                self._kill()
                await self.has_ended_within(5.0)
            # What a dead process has sent may still be on its way through ZeroMQ's thread to our reader.
            await asyncio.sleep(_LAST_WORDS_S)
        finally:
            self._kill()
            self._close_sockets()

    def describe_exit(self) -> str:
        code = self._process.returncode if self._process is not None else None
        if code is not None and code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            return f"the engine process was ended by {signal.Signals(-code).name}{hint}"
        return f"the engine process ended with exit code {code}"

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def _bind(self, kind: int, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set_hwm(0)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(address)
        return socket

    def drain(self) -> None:
        """ZeroMQ's descriptor only signals changes, so everything that is there must be read each time."""
        while True:
            try:
                frame = self._from_engine.recv(zmq.NOBLOCK)
            except zmq.ZMQError:
                return
            self._receive(decode_from_engine(frame))

    def _close_sockets(self) -> None:
        if not self._from_engine.closed:
            self._loop.remove_reader(self._from_engine.fileno())
        self._context.destroy(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)


def _private_directory() -> Path:
    """A 0700 directory named after its owner; in /tmp when the usual place is too deep for a Unix socket's name."""
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) > _LONGEST_PARENT:
        parent = Path("/tmp")  # noqa: S108 - mkdtemp makes a directory that only we can enter
    _remove_leftovers(parent)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))


def _remove_leftovers(parent: Path) -> None:
    """What killed gateways of this user left: two dead sockets each."""
    for path in parent.glob(f"{_PREFIX}*-*"):
        owner = path.name.removeprefix(_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            if owner.isdecimal() and path.stat().st_uid == os.getuid() and not _is_alive(int(owner)):
                shutil.rmtree(path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
