"""Starting servers for a benchmark and waiting until they answer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 1200


@dataclass(frozen=True, slots=True)
class Server:
    base_url: str  # with /v1
    pid: int
    start_s: float  # from the command to the first ready answer


@contextmanager
def causerie(*arguments: str, threads: int | None = None) -> Generator[Server]:
    """`causerie serve` on a free port, ready; a model that is not prepared yet is prepared first."""
    port = free_port()
    environment = dict(os.environ)
    if threads is not None:
        environment["CAUSERIE_COMPUTE_THREADS"] = str(threads)
    command = [sys.executable, "-m", "serving.cli", "serve", "--port", str(port), *arguments]
    with running(command, f"http://127.0.0.1:{port}", "/health/ready", environment) as server:
        yield server


@contextmanager
def running(command: list[str], address: str, ready_path: str, environment: dict[str, str]) -> Generator[Server]:
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            if not _becomes_ready(process, address + ready_path):
                log.seek(0)
                tail = log.read()[-2000:].decode(errors="replace")
                raise RuntimeError(f"{' '.join(command)} did not get ready within {START_TIMEOUT_S} s:\n{tail}")
            yield Server(f"{address}/v1", process.pid, time.monotonic() - started)
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


def _becomes_ready(process: subprocess.Popen[bytes], url: str) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - loopback
                if answer.status == 200:
                    return True
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.1)
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def children_of(pid: int) -> list[int]:
    """Linux only: direct children, from /proc."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def resident_mb(pid: int) -> float:
    """Linux only: resident set of one process in MB (10**6 bytes)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/{pid}/status has no VmRSS")
