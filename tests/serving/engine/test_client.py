"""The engine process and its client, with a scripted engine in a real child process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from quant.errors import CheckpointError
from serving.child_process import child_environment, python_command
from serving.engine.client import EngineClient, EngineState
from serving.engine.requests import (
    EngineEvent,
    FailedEvent,
    GenerateRequest,
    PoolEvent,
    PoolRequest,
    SamplingParams,
    TokenEvent,
)
from serving.engine.wire import EngineSettings
from serving.errors import EngineStopped, QueueFull
from tests.serving.engine.scripted_engine import CRASH, HANG, MAX_CONTEXT, TOO_LONG

pytestmark = pytest.mark.unit

DIRECTORY = Path("/nowhere")
PATIENCE_S = 20.0


def settings(factory: str = "scripted", *, max_running: int = 64, max_waiting: int = 256) -> EngineSettings:
    return EngineSettings(
        directory="",
        kv_bytes=0,
        max_running=max_running,
        max_waiting=max_waiting,
        log_level=60,
        heartbeat_s=0.05,
        factory=f"tests.serving.engine.scripted_engine:{factory}",
    )


def generate(request_id: str = "r", *, max_tokens: int = 5, first_id: int = 1, num_choices: int = 1) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        prompt_ids=[first_id, 2, 3],
        sampling=SamplingParams(max_tokens=max_tokens, seed=0),
        num_choices=num_choices,
    )


@asynccontextmanager
async def running(client: EngineClient) -> AsyncGenerator[EngineClient]:
    async with asyncio.timeout(PATIENCE_S):
        await client.start(DIRECTORY)
        try:
            yield client
        finally:
            await client.close()


async def read(events: AsyncIterator[EngineEvent]) -> list[EngineEvent]:
    return [event async for event in events]


def text_of(events: list[EngineEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TokenEvent))


async def until_ready(client: EngineClient) -> None:
    while client.state is not EngineState.READY:
        await asyncio.sleep(0.01)


async def test_a_stream_brings_every_token_once_and_ends() -> None:
    async with running(EngineClient(settings())) as client:
        events = await read(client.submit(generate()))
        assert text_of(events) == "0 1 2 3 4 "
        assert [e.finish_reason for e in events if isinstance(e, TokenEvent)] == [None] * 4 + ["length"]
        assert client.state is EngineState.READY
        assert client.max_context == MAX_CONTEXT
        assert client.seconds_since_progress() is None


async def test_choices_and_kinds_share_the_connection() -> None:
    async with running(EngineClient(settings())) as client:
        both, pooled = await asyncio.gather(
            read(client.submit(generate("two", num_choices=2, max_tokens=3))),
            read(client.submit(PoolRequest(request_id="pool", ids=[1]))),
        )
        finished = [e.choice_index for e in both if isinstance(e, TokenEvent) and e.finish_reason]
        assert sorted(finished) == [0, 1]
        assert len(both) == 6
        assert pooled == [PoolEvent(request_id="pool", values=[1.5])]


async def test_a_request_the_engine_refuses_is_answered() -> None:
    async with running(EngineClient(settings())) as client:
        events = await read(client.submit(generate(first_id=TOO_LONG)))
        assert [type(event) for event in events] == [FailedEvent]
        assert isinstance(events[0], FailedEvent)
        assert events[0].code == "context_length_exceeded"


async def test_closing_a_stream_frees_it_in_the_engine_and_says_how_long_it_took() -> None:
    freed: list[float] = []
    async with running(EngineClient(settings(), on_freed=freed.append)) as client:
        stream = client.submit(generate(max_tokens=10**9))
        await anext(stream)
        await stream.aclose()
        while not freed:
            await asyncio.sleep(0.01)
        assert 0 <= freed[0] < PATIENCE_S
        assert client.stats is not None
        assert client.stats.num_running == 0
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_cancel_ends_the_stream_with_its_reason_and_only_once() -> None:
    async with running(EngineClient(settings())) as client:
        stream = client.submit(generate(max_tokens=10**9, num_choices=2))
        await anext(stream)
        assert await client.cancel("r")
        events = await read(stream)
        reasons = [e.finish_reason for e in events if isinstance(e, TokenEvent) and e.finish_reason]
        assert reasons == ["cancelled", "cancelled"]
        assert not await client.cancel("r")


async def test_a_crash_ends_open_streams_with_an_error_and_the_next_engine_answers() -> None:
    async with running(EngineClient(settings())) as client:
        first_pid = client.pid
        bystander = client.submit(generate("bystander", max_tokens=10**9))
        doomed = client.submit(generate("doomed", first_id=CRASH))
        with pytest.raises(EngineStopped, match="scripted crash"):
            await read(doomed)
        with pytest.raises(EngineStopped):
            await read(bystander)
        await until_ready(client)
        assert client.pid != first_pid
        assert text_of(await read(client.submit(generate()))) == "0 1 2 3 4 "
        assert client.num_restarts == 1


async def test_a_killed_engine_is_replaced() -> None:
    async with running(EngineClient(settings())) as client:
        stream = client.submit(generate(max_tokens=10**9))
        await anext(stream)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(EngineStopped, match="SIGKILL"):
            await read(stream)
        assert client.state is EngineState.RESTARTING
        with pytest.raises(EngineStopped, match="restarting") as refused:
            client.submit(generate("while-down"))
        assert refused.value.retry_after_s is not None
        await until_ready(client)
        assert text_of(await read(client.submit(generate()))) == "0 1 2 3 4 "


async def test_a_hung_engine_is_noticed_and_replaced() -> None:
    async with running(EngineClient(settings(), stall_after_s=0.3)) as client:
        with pytest.raises(EngineStopped, match=r"no progress for 0\.3 s"):
            await read(client.submit(generate(first_id=HANG)))
        await until_ready(client)
        assert text_of(await read(client.submit(generate()))) == "0 1 2 3 4 "


async def test_progress_is_measured_from_the_last_step_while_something_is_queued() -> None:
    now = 1000.0
    async with running(EngineClient(settings(), clock=lambda: now)) as client:
        assert client.seconds_since_progress() is None
        stream = client.submit(generate(first_id=HANG))
        assert client.seconds_since_progress() == 0
        await anext(stream)
        await anext(stream)
        now = 1040.0
        assert client.seconds_since_progress() == 40
        await stream.aclose()


async def test_a_hang_is_noticed_also_when_everybody_has_hung_up() -> None:
    now = 1000.0
    async with running(EngineClient(settings(), clock=lambda: now)) as client:
        stream = client.submit(generate(first_id=HANG))
        await anext(stream)
        await anext(stream)
        await stream.aclose()
        now = 1040.0
        assert client.seconds_since_progress() == 40


async def test_a_cancellation_that_comes_too_late_is_forgotten() -> None:
    freed: list[float] = []
    async with running(EngineClient(settings(), on_freed=freed.append)) as client:
        stream = client.submit(generate(max_tokens=1))
        await stream.aclose()
        while client.seconds_since_progress() is not None:
            await asyncio.sleep(0.001)
        assert len(freed) <= 1


async def test_a_full_queue_is_refused_with_a_time_to_come_back() -> None:
    async with running(EngineClient(settings(max_running=1, max_waiting=1))) as client:
        streams = [client.submit(generate(f"r{i}", max_tokens=10**9)) for i in range(2)]
        with pytest.raises(QueueFull, match="1 sequences are waiting; this server queues at most 1") as full:
            client.submit(generate("third"))
        assert full.value.retry_after_s == 1
        for stream in streams:
            await stream.aclose()
        assert text_of(await read(client.submit(generate("third")))) == "0 1 2 3 4 "


async def test_sequences_that_wait_for_a_beginning_do_not_make_the_queue_full() -> None:
    async with running(EngineClient(settings(max_running=4, max_waiting=1))) as client:
        stream = client.submit(generate("four", num_choices=2, max_tokens=10**9))
        await anext(stream)
        stats = client.stats
        assert stats is not None
        for num_awaiting, is_refused in ((1, False), (0, True)):
            client.stats = msgspec.structs.replace(stats, num_running=1, num_waiting=1, num_awaiting_turn=num_awaiting)
            if is_refused:
                with pytest.raises(QueueFull):
                    client.submit(generate("other"))
            else:
                other = client.submit(generate("accepted"))
                await other.aclose()
        await stream.aclose()


async def test_a_model_that_cannot_be_served_fails_the_start_with_its_reason() -> None:
    client = EngineClient(settings("broken_checkpoint"))
    with pytest.raises(CheckpointError, match=r"/nowhere: config.json is missing"):
        await client.start(DIRECTORY)
    assert client.state is EngineState.FAILED


async def test_a_start_that_breaks_is_reported_not_awaited_for_ever() -> None:
    client = EngineClient(settings("breaks_while_loading"))
    with pytest.raises(EngineStopped, match="MemoryError: scripted"):
        await client.start(DIRECTORY)


async def test_close_ends_the_process_and_its_streams() -> None:
    client = EngineClient(settings())
    async with running(client):
        stream = client.submit(generate(max_tokens=10**9))
        pid = client.pid
    with pytest.raises(EngineStopped):
        await read(stream)
    assert client.state is EngineState.CLOSED
    assert pid is not None
    assert not Path(f"/proc/{pid}").exists()


GATEWAY = """
import asyncio, sys
from tests.serving.engine.test_client import DIRECTORY, generate, settings
from serving.engine.client import EngineClient

async def main():
    client = EngineClient(settings())
    await client.start(DIRECTORY)
    await anext(client.submit(generate(max_tokens=10**9)))
    print(client.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_a_killed_gateway_leaves_no_engine() -> None:
    command = [sys.executable, "-c", GATEWAY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=child_environment(os.environ), text=True) as gateway:
        assert gateway.stdout is not None
        engine_pid = int(gateway.stdout.readline())
        engine = os.pidfd_open(engine_pid)
        gateway.kill()
        gateway.wait()
        assert ends(engine, timeout_s=PATIENCE_S)


def ends(pidfd: int, timeout_s: float) -> bool:
    """A pidfd becomes readable when its process has ended."""
    import select

    try:
        return bool(select.select([pidfd], [], [], timeout_s)[0])
    finally:
        os.close(pidfd)


@pytest.fixture
def short_path() -> Generator[Path]:
    """pytest's own directories can be too deep for a socket's name."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


async def test_what_a_killed_gateway_left_is_removed_and_what_a_living_one_uses_is_not(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(short_path))
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    left, in_use = short_path / f"causerie-engine-{dead.pid}-x", short_path / f"causerie-engine-{os.getppid()}-x"
    for directory in (left, in_use):
        directory.mkdir()
    async with running(EngineClient(settings())):
        own = [path for path in short_path.iterdir() if path not in (left, in_use)]
        assert not left.exists()
        assert in_use.exists()
        assert [path.stat().st_mode & 0o777 for path in own] == [0o700]
    assert list(short_path.iterdir()) == [in_use]


async def test_draining_finishes_what_is_open_and_takes_nothing_new() -> None:
    async with running(EngineClient(settings())) as client:
        stream = client.submit(generate(max_tokens=50))
        draining = asyncio.create_task(client.drain(PATIENCE_S))
        await anext(stream)
        with pytest.raises(EngineStopped, match="draining"):
            client.submit(generate("late"))
        await draining
        assert len(await read(stream)) == 49


async def test_draining_does_not_wait_for_ever() -> None:
    async with running(EngineClient(settings())) as client:
        stream = client.submit(generate(max_tokens=10**9))
        await client.drain(0.05)
    with pytest.raises(EngineStopped):
        await read(stream)


def test_end_of_input_alone_also_ends_an_engine(tmp_path: Path) -> None:
    """The way out where there is no parent-death signal."""
    arguments = (msgspec.json.encode(settings()).decode(), str(tmp_path), str(os.getpid()))
    command = python_command("serving.engine.process", *arguments)
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=child_environment(os.environ)) as engine:
        assert engine.stdin is not None
        engine.stdin.close()
        assert engine.wait(PATIENCE_S) == 1


def test_the_engine_process_imports_no_web_no_page_no_moderation() -> None:
    code = (
        "import sys; before = set(sys.modules); import serving.engine.process, serving.engine.engine; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=child_environment(os.environ)
    )
    imported = set(result.stdout.split())
    assert {"torch", "zmq"} <= imported
    forbidden = {"fastapi", "starlette", "uvicorn", "gradio", "transformers", "moderation", "pandas", "sklearn", "ui"}
    assert not imported & forbidden
