"""A real `causerie serve` on a free port, for system tests: started, asked, killed and stopped like a user's."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import TextIO

import httpx
import psutil

from serving.child_process import child_environment, python_command

MODEL = "smollm2-135m-instruct"
# The first start on a clean machine downloads and quantises the model.
PREPARE_TIMEOUT_S = 900.0
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 40.0


@dataclass
class ServerProcess:
    """`base_url` has no `/v1`. `output` grows while the server runs; it is shown when a start fails."""

    process: subprocess.Popen[str]
    output: list[str] = field(default_factory=list[str])
    lines: Queue[str] = field(default_factory=Queue[str])
    base_url: str = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def engine_pid(self) -> int:
        """The one engine process below this server."""
        engines = [child for child in psutil.Process(self.pid).children() if _is_engine(child)]
        assert len(engines) == 1, engines
        return engines[0].pid

    def client(self, timeout_s: float = 60.0) -> httpx.Client:
        return httpx.Client(base_url=self.base_url, timeout=timeout_s, trust_env=False)

    def metric(self, name: str) -> float:
        """The sum over the labels of one metric."""
        with self.client() as client:
            samples = [line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines()]
        return sum(float(value) for sample, value in samples if sample.partition("{")[0] == name)

    def is_ready(self) -> bool:
        with self.client() as client:
            return client.get("/health/ready").status_code == 200

    def wait_for_line(self, start: str, timeout_s: float) -> str:
        """The next line of standard output that begins so."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                raise AssertionError(f"no line {start!r} within {timeout_s:g} s:\n{self.log}") from None
            assert line, f"the server ended before {start!r}:\n{self.log}"
            if line.startswith(start):
                return line

    @property
    def log(self) -> str:
        return "".join(self.output)

    def stop(self, signum: int = signal.SIGTERM) -> int:
        self.process.send_signal(signum)
        return self.process.wait(STOP_TIMEOUT_S)


@contextmanager
def running_server(
    *arguments: str, environ: Mapping[str, str] | None = None, cwd: Path | None = None, program: Path | None = None
) -> Generator[ServerProcess]:
    """A server that has printed its address; it may not be ready yet. `program` is an installed `causerie`."""
    inherited = child_environment(os.environ) if program is None else os.environ
    command = python_command("serving.cli") if program is None else [str(program)]
    process = subprocess.Popen(
        [*command, "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**inherited, **(environ or {})},
        cwd=cwd,
    )
    server = ServerProcess(process)
    readers = [
        threading.Thread(target=_read, args=(process.stdout, server, True), daemon=True),
        threading.Thread(target=_read, args=(process.stderr, server, False), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        line = server.wait_for_line("API", START_TIMEOUT_S)
        server.base_url = line.split()[-1].removesuffix("/v1")
        yield server
    finally:
        if process.poll() is None:
            try:
                server.stop()
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for reader in readers:
            reader.join()


def wait_until(is_true: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Seconds until it was true."""
    started = time.monotonic()
    pause = threading.Event()
    while not is_true():
        assert time.monotonic() - started < timeout_s, f"{what} not within {timeout_s:g} s"
        pause.wait(0.05)
    return time.monotonic() - started


def _read(stream: TextIO, server: ServerProcess, is_stdout: bool) -> None:
    with stream:
        for line in stream:
            server.output.append(line)
            if is_stdout:
                server.lines.put(line)
    if is_stdout:
        server.lines.put("")


def _is_engine(process: psutil.Process) -> bool:
    try:
        return "serving.engine.process" in process.cmdline()
    except psutil.Error:
        return False
