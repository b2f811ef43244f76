"""Nothing leaves the machine once the model is prepared: every connection of every process of a server is watched."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from tests.system.server_process import MODEL, START_TIMEOUT_S, ServerProcess, running_server

pytestmark = pytest.mark.system

# Runs in each Python process of the server before anything else, and writes down whom it calls or asks the name of.
WATCHER = """
import os, sys

def watch(event, arguments):
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    with open(os.environ["WATCHED_CONNECTIONS"], "a") as file:
        file.write(f"{event} {host}\\n")

sys.addaudithook(watch)
with open(os.environ["WATCHED_CONNECTIONS"], "a") as file:
    file.write("watching " + " ".join(sys.orig_argv[1:5]) + "\\n")
"""
LOOPBACK = {"127.0.0.1", "::1", "localhost", "None", "b'127.0.0.1'", "b'localhost'"}


def test_no_process_of_a_server_connects_to_another_machine(server: ServerProcess, tmp_path: Path) -> None:
    """`server` first: the model is prepared."""
    (tmp_path / "sitecustomize.py").write_text(WATCHER, encoding="utf-8")
    record = tmp_path / "connections.txt"
    root = Path(__file__).resolve().parents[2]
    environ = {
        "PYTHONPATH": os.pathsep.join([str(root), str(tmp_path)]),
        "WATCHED_CONNECTIONS": str(record),
    }
    with running_server(environ=environ) as own:
        own.wait_for_line("ready", START_TIMEOUT_S)
        use(own)
        processes = [psutil.Process(own.pid), *psutil.Process(own.pid).children(recursive=True)]
        remote = {
            connection.raddr.ip
            for process in processes
            for connection in process.net_connections("inet")
            if connection.raddr
        }
    lines = record.read_text(encoding="utf-8").splitlines()
    watched = [line for line in lines if line.startswith("watching")]
    assert any("serving.cli" in line for line in watched)
    assert any("serving.engine.process" in line for line in watched)
    called = {line.split(" ", 1)[1] for line in lines if not line.startswith("watching")}
    assert called - LOOPBACK == set()
    assert remote - LOOPBACK == set()


def use(server: ServerProcess) -> None:
    messages = [{"role": "user", "content": "Say hello."}]
    with server.client() as client:
        assert client.get("/").status_code == 200
        assert client.get("/v1/models").status_code == 200
        assert client.post("/v1/moderations", json={"input": "hello"}).status_code == 200
        body = {"model": MODEL, "messages": messages, "max_tokens": 4, "stream": True}
        assert client.post("/v1/chat/completions", json=body).text.endswith("data: [DONE]\n\n")
