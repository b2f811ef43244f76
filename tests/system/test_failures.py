"""What happens when something is killed, hangs up, or comes all at once: with the real server and model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from serving.child_process import child_environment, python_command
from serving.models import cache_directory, model_folder, resolve
from tests.system.server_process import (
    MODEL,
    PREPARE_TIMEOUT_S,
    START_TIMEOUT_S,
    ServerProcess,
    running_server,
    wait_until,
)

pytestmark = pytest.mark.system

ENGINE_BACK_S = 10.0


def chat(prompt: str, **fields: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **fields}


def endless(prompt: str = "List all rivers of the world.") -> dict[str, object]:
    """An answer that goes on until somebody ends it.

    A greedy list: what is drawn after an end of turn is now and then flagged, and then moderation ends it.
    """
    return chat(prompt, stream=True, max_tokens=6000, ignore_eos=True, temperature=0)


def events(response: httpx.Response) -> Iterator[str]:
    """The payload of each server-sent event."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


def cached_files() -> dict[str, int]:
    """Every file of the prepared model, with its time."""
    folder = model_folder(cache_directory(os.environ), resolve(MODEL))
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "lock"}


def busyness() -> float:
    """How many times more work than cores there is here: by so much longer a promise in seconds takes."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def answer(server: ServerProcess) -> httpx.Response:
    with server.client() as client:
        return client.post("/v1/chat/completions", json=chat("Say hello.", max_tokens=4))


def test_a_killed_engine_is_an_error_event_and_the_server_answers_again_within_10_s(server: ServerProcess) -> None:
    killed = server.engine_pid
    received: list[str] = []
    with server.client() as client, client.stream("POST", "/v1/chat/completions", json=endless()) as response:
        for event in events(response):
            received.append(event)
            if len(received) == 5:
                os.kill(killed, signal.SIGKILL)
    assert received[-1] == "[DONE]"
    assert json.loads(received[-2])["error"]["code"] == "engine_stopped"
    assert all(not choice["finish_reason"] for event in received[:-2] for choice in json.loads(event)["choices"])
    with server.client() as client:
        waiting = client.get("/health/ready")
        refused = answer(server)
    assert (waiting.status_code, refused.status_code) == (503, 503)
    assert int(refused.headers["retry-after"]) >= 1
    wait_until(server.is_ready, ENGINE_BACK_S * busyness(), "the restarted engine")
    assert answer(server).status_code == 200
    assert server.engine_pid != killed


def test_a_client_that_hangs_up_frees_its_cache(server: ServerProcess) -> None:
    freed_before = server.metric("causerie_cancel_to_freed_seconds_count")
    with server.client() as client, client.stream("POST", "/v1/chat/completions", json=endless()) as response:
        received = events(response)  # kept: an iterator that nobody holds closes the response
        next(received)
        # The first event only says who speaks; the prompt may still wait.
        wait_until(lambda: server.metric("causerie_kv_blocks_used") > 0, 10.0 * busyness(), "a cache in use")
    wait_until(lambda: server.metric("causerie_kv_blocks_used") == 0, 5.0 * busyness(), "a free cache")
    assert server.metric("causerie_cancel_to_freed_seconds_count") == freed_before + 1
    assert server.metric("causerie_sequences_running") == 0


def test_a_client_that_hangs_up_while_its_long_prompt_is_read_frees_it_too(server: ServerProcess) -> None:
    request = json.dumps(endless("word " * 6000)).encode()
    host, port = server.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(request)}\r\n\r\n".encode()
            + request
        )
        wait_until(
            lambda: server.metric("causerie_sequences_running") > 0, 10.0 * busyness(), "the prompt in the engine"
        )
    wait_until(lambda: server.metric("causerie_sequences_running") == 0, 5.0 * busyness(), "its end")
    assert server.metric("causerie_kv_blocks_used") == 0


def test_32_streams_at_once_all_finish(server: ServerProcess) -> None:
    def stream(index: int) -> tuple[str, str]:
        body = chat(f"Write {index} words about rivers.", stream=True, max_tokens=24, ignore_eos=True)
        with server.client(300.0) as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            received = list(events(response))
        return json.loads(received[-2])["choices"][0]["finish_reason"], received[-1]

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(stream, range(32))) == [("length", "[DONE]")] * 32
    assert server.metric("causerie_kv_blocks_used") == 0


def test_a_killed_server_leaves_no_process(server: ServerProcess) -> None:
    """`server` first: the model is prepared, so this start is a short one."""
    with running_server() as own:
        own.wait_for_line("ready", START_TIMEOUT_S)
        children = psutil.Process(own.pid).children(recursive=True)
        assert children
        own.process.kill()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert alive == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_server_lets_an_answer_end_and_leaves_nothing(server: ServerProcess, signum: int) -> None:
    """It prepares nothing either: the model of the first start is used again."""
    prepared = cached_files()
    with running_server("--shutdown-grace-s", "30") as own:
        own.wait_for_line("ready", START_TIMEOUT_S)
        engine = psutil.Process(own.engine_pid)
        received: list[str] = []
        body = chat("Hello", stream=True, max_tokens=40, ignore_eos=True)
        with own.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
            for event in events(response):
                received.append(event)
                if len(received) == 3:
                    own.process.send_signal(signum)
        assert received[-1] == "[DONE]"
        assert json.loads(received[-2])["choices"][0]["finish_reason"] == "length"
        assert own.process.wait(30) == 0
        assert not engine.is_running()
        assert "Traceback" not in own.log
        assert " ..." not in own.log  # how a stage of the preparation begins
    assert cached_files() == prepared


def test_a_port_in_use_is_one_line_with_a_cure(server: ServerProcess) -> None:
    port = server.base_url.rpartition(":")[2]
    result = run_serve("--port", port)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == (
        f"causerie: port {port} is in use on 127.0.0.1; stop what uses it, or choose another: --port {int(port) + 1}\n"
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--model", "smollm3-135m-instruct"], "did you mean 'smollm2-135m-instruct'?"),
        (["--host", "0.0.0.0"], "no API key is set"),
        (["--kv-memory", "lots"], "kv_memory must be a size"),
    ],
)
def test_a_start_that_cannot_work_is_one_line_and_exit_code_1(arguments: list[str], reason: str) -> None:
    result = run_serve("--port", "0", *arguments)
    assert result.returncode == 1
    assert reason in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_directory_that_is_no_model_says_what_is_missing(tmp_path: Path) -> None:
    result = run_serve("--port", "0", "--model", str(tmp_path))
    assert result.returncode == 1
    assert "config.json" in result.stderr
    assert "Traceback" not in result.stderr


def run_serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        python_command("serving.cli", "serve", *arguments),
        capture_output=True,
        text=True,
        timeout=PREPARE_TIMEOUT_S,
        env=child_environment(os.environ),
    )
