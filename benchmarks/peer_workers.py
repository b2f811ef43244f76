"""Engines without a server, each in a process of its own: ours and vLLM's over pipes, llama.cpp by its llama-bench.

A worker prints one JSON line when it is ready, then answers each line on stdin with a line: a `generate` task gives
`prefill_s`, `decode_s` and `num_decoded`. `peers.py` measures by these.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
# Ids that are ordinary words in the default model's vocabulary.
LOWEST_ID, HIGHEST_ID = 1000, 40000


class WorkerError(RuntimeError):
    """A measuring process ended or refused; the message holds its last words."""


@dataclass(frozen=True, slots=True)
class Generation:
    """Seconds of one batch: from submitting it to the last stream's first token, and from there to the end."""

    prefill_s: float
    decode_s: float
    num_decoded: int

    @property
    def decoded_per_s(self) -> float:
        return self.num_decoded / self.decode_s


class Worker:
    def __init__(self, process: subprocess.Popen[str], log: IO[bytes]) -> None:
        self._process = process
        self._log = log
        self.pid = process.pid
        self.ready: Mapping[str, Any] = self._answer()

    def ask(self, task: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise WorkerError(f"the process has ended: {self._last_words()}") from error
        return self._answer()

    def generate(self, num_streams: int, prompt_tokens: int, new_tokens: int, seed: int) -> Generation:
        """Random prompts, so that no cache of beginnings helps; the same ones on every worker."""
        name = f"{num_streams}-{prompt_tokens}-{new_tokens}-{seed}"
        prompts = random_prompts(num_streams, prompt_tokens, name)
        answer = self.ask({"kind": "generate", "name": name, "prompts": prompts, "new_tokens": new_tokens})
        return Generation(**answer)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise WorkerError(f"the process ended with {self._process.returncode}: {self._last_words()}")
        return json.loads(line)

    def _last_words(self) -> str:
        self._log.seek(0)
        return self._log.read()[-2000:].decode(errors="replace")


@contextmanager
def worker(command: Sequence[str | Path], environment: Mapping[str, str]) -> Generator[Worker]:
    """Started and ready. Raises WorkerError if it does not get so far."""
    with tempfile.TemporaryFile() as log, _started(command, environment, log) as process:
        try:
            yield Worker(process, log)
        finally:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()  # the end of its tasks: it leaves by itself
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


def _started(command: Sequence[str | Path], environment: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
        cwd=ROOT,
        text=True,
    )


def random_prompts(num_prompts: int, num_tokens: int, name: str) -> list[list[int]]:
    rng = random.Random(name)  # noqa: S311 - test data
    return [[rng.randrange(LOWEST_ID, HIGHEST_ID) for _ in range(num_tokens)] for _ in range(num_prompts)]


@dataclass(frozen=True, slots=True)
class BenchResult:
    """One line of llama-bench: so many tokens read or written a second, after `depth` tokens of context."""

    num_prompt: int
    num_generated: int
    depth: int
    tokens_per_s: float
    build: str


def parse_bench(text: str) -> list[BenchResult]:
    """Of `llama-bench -o json`. Raises WorkerError if that is not what it is."""
    try:
        return [
            BenchResult(
                num_prompt=entry["n_prompt"],
                num_generated=entry["n_gen"],
                depth=entry["n_depth"],
                tokens_per_s=float(entry["avg_ts"]),
                build=f"{entry['build_commit']} ({entry['build_number']})",
            )
            for entry in json.loads(text)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise WorkerError(f"llama-bench printed no results: {text[-300:]!r}") from error


def llama_bench(
    binary: Path, gguf: Path, threads: int, *, prompt: int = 0, generated: int = 0, depth: int = 0
) -> BenchResult:
    """One repetition after llama-bench's own warm-up."""
    command: list[str | Path] = [binary, "-m", gguf, "-t", str(threads), "-r", "1", "-o", "json"]
    command += ["-p", str(prompt), "-n", str(generated), "-d", str(depth)]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise WorkerError(f"llama-bench failed with {done.returncode}: {done.stderr[-600:]}")
    (result,) = parse_bench(done.stdout)
    return result
