"""What `peers.py` measures and the goals: each measure as a call a side and round, nothing run here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.pausing import awake
from benchmarks.peer_http import HttpSide
from benchmarks.peer_rows import BEST_OF_PEERS, Measure
from benchmarks.peer_setup import LlamaCpp
from benchmarks.peer_workers import Worker, llama_bench

LLAMA_CPP, VLLM, MEMORY = "llama.cpp", "vLLM", "memory"
CONTEXT_TOKENS = 512
CONTEXT_WORDS = 450  # with the question and the template about as many tokens
STREAM_PROMPT_TOKENS = 16


def engine_measures(
    options: argparse.Namespace,
    ours: Worker,
    vllm: Worker | None,
    llama: LlamaCpp | None,
    missing: Mapping[str, str],
) -> Iterator[Measure]:
    new, capped = options.new_tokens, "" if options.isa == "native" else f", {options.isa.upper()} at most"
    without_llama = {name: why for name, why in missing.items() if name == LLAMA_CPP}
    without_vllm = {name: why for name, why in missing.items() if name == VLLM}

    def bench(**task: int) -> dict[str, Callable[[int], float]]:
        if llama is None:
            return {}
        found = llama
        return {LLAMA_CPP: lambda _: llama_bench(found.bench, found.gguf, options.threads, **task).tokens_per_s}

    if "decode" in options.only:
        goal = 2.0 if options.isa == "native" else 1.0
        for depth, name in ((0, "no context"), (CONTEXT_TOKENS, f"after {CONTEXT_TOKENS} tokens")):
            yield Measure(
                what=f"decode, 1 stream, {name}{capped}",
                where="engine",
                unit="tokens/s",
                ours=decoding(ours, 1, max(1, depth), new),
                peers=bench(generated=new, depth=depth),
                missing=without_llama,
                goal=goal,
                goal_beside=LLAMA_CPP,
            )
    for num_streams in options.streams if "streams" in options.only else ():
        yield Measure(
            what=f"decode, {num_streams} streams",
            where="engine",
            unit="tokens/s",
            ours=decoding(ours, num_streams, STREAM_PROMPT_TOKENS, new),
            peers={} if vllm is None else {VLLM: decoding(vllm, num_streams, STREAM_PROMPT_TOKENS, new)},
            missing=without_vllm,
            goal=1.5,
            goal_beside=VLLM,
        )
    for num_tokens in options.prefill if "prefill" in options.only else ():
        beside_vllm = {} if vllm is None else {VLLM: prefilling(vllm, num_tokens)}
        yield Measure(
            what=f"prefill, {num_tokens:,} tokens",
            where="engine",
            unit="tokens/s",
            ours=prefilling(ours, num_tokens),
            peers={**beside_vllm, **bench(prompt=num_tokens)},
            missing=missing,
            goal=1.3,
            goal_beside=VLLM,
        )
    if "bandwidth" in options.only:
        weight_bytes = ours.ready["weight_bytes_per_token"]
        decode = decoding(ours, 1, 1, new)
        yield Measure(
            what="weights read while decoding, 1 stream",
            where="engine",
            unit="GB/s",
            ours=lambda index: decode(index) * weight_bytes / 1e9,
            peers={MEMORY: lambda _: asked(ours, {"kind": "bandwidth"})["bytes_per_s"] / 1e9},
            goal=0.6,
            goal_beside=MEMORY,
        )


def decoding(side: Worker, num_streams: int, prompt_tokens: int, new_tokens: int) -> Callable[[int], float]:
    """One token more than is asked for: the first one belongs to the prompt."""

    def measure(index: int) -> float:
        with awake(side.pid):
            return side.generate(num_streams, prompt_tokens, new_tokens + 1, seed=index).decoded_per_s

    return measure


def prefilling(side: Worker, num_tokens: int) -> Callable[[int], float]:
    def measure(index: int) -> float:
        with awake(side.pid):
            return num_tokens / side.generate(1, num_tokens, 1, seed=index).prefill_s

    return measure


def asked(side: Worker, task: Mapping[str, Any]) -> dict[str, Any]:
    with awake(side.pid):
        return side.ask(task)


def http_measures(
    options: argparse.Namespace, ours: HttpSide, sides: Mapping[str, HttpSide], missing: Mapping[str, str]
) -> Iterator[Measure]:
    """Everybody beside everybody; the goal stands beside one."""

    def beside_all(what: str, unit: str, call: Callable[[HttpSide, int], float]) -> Measure:
        peers = {name: partial(call, side) for name, side in sides.items()}
        return Measure(what=what, where="HTTP", unit=unit, ours=partial(call, ours), peers=peers, missing=missing)

    def one_stream(side: HttpSide, index: int, *, words: int) -> float:
        return side.one_stream(words, options.new_tokens, index)

    def streams(side: HttpSide, index: int, *, count: int) -> float:
        return side.streams(count, options.new_tokens, index)

    if "http" in options.only:
        for words, name in ((0, "no context"), (CONTEXT_WORDS, f"after {CONTEXT_TOKENS} tokens")):
            measure = beside_all(f"decode, 1 stream, {name}", "tokens/s", partial(one_stream, words=words))
            yield replace(measure, goal=2.0, goal_beside=LLAMA_CPP)
        for count in options.streams:
            measure = beside_all(f"decode, {count} streams", "tokens/s", partial(streams, count=count))
            yield replace(measure, goal=1.5, goal_beside=VLLM)
    if "first-token" in options.only:
        measure = beside_all(
            "first token, short prompt, idle server", "ms", lambda side, i: side.first_token_ms(options.requests, i)
        )
        yield replace(measure, goal=0.7, goal_beside=BEST_OF_PEERS, better="less")
    if "second-turn" in options.only:
        measure = beside_all(
            "first token, second turn of a conversation", "ms", lambda side, i: side.second_turn_ms(options.requests, i)
        )
        yield replace(measure, goal=0.5, goal_beside=BEST_OF_PEERS, better="less")
