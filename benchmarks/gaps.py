"""How long running streams wait between two tokens, idle and beside a long prompt, and what that costs the prompt.

    python -m benchmarks.gaps --json gaps.json
    python -m benchmarks.gaps --slowdowns 1.5,2,2.5,3,none

The engine as a library in this process, the default model. Rounds in turns: streams alone, then the same streams beside
a prompt of 4,000 tokens until its first token. A gap is the time from one token of a stream to its next.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.own_cost import newest_prepared

if TYPE_CHECKING:
    from serving.engine.engine import Engine

GOAL = 3.0
KV_BYTES = 1 << 29
STREAM_PROMPT_TOKENS = 64
IDLE_STEPS = 200


@dataclass(frozen=True, slots=True)
class Round:
    """Gaps in seconds, sorted."""

    idle: list[float]
    beside: list[float]
    first_token_s: float  # of the long prompt


@dataclass(frozen=True, slots=True)
class Row:
    """Medians of the rounds. Times in milliseconds."""

    num_streams: int
    slowdown: float | None  # the limit; None: a prompt takes whole steps
    idle_p50_ms: float
    idle_p99_ms: float
    beside_p50_ms: float
    beside_p99_ms: float
    ratio_p50: float
    ratio_p99: float
    first_token_ms: float
    first_token_alone_ms: float


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    bench = Bench(options.model_directory or newest_prepared(), options.threads, options.prompt_tokens)
    alone_ms = 1e3 * median(bench.first_token_alone() for _ in range(options.rounds))
    rows: list[Row] = []
    print("streams limit   idle p50  p99   beside p50  p99   ratio p50  p99   long prompt's first token (ms)")
    for num_streams in options.streams:
        found: dict[float | None, list[Round]] = {limit: [] for limit in options.slowdowns}
        for index in range(options.rounds):
            for limit in options.slowdowns if index % 2 == 0 else reversed(options.slowdowns):
                found[limit].append(bench.round(num_streams, limit))
        for limit, rounds in found.items():
            rows.append(_row(num_streams, limit, rounds, alone_ms))
            print(_line(rows[-1]), flush=True)
    if options.json:
        record = {"goal_ratio_p99": GOAL, "machine": machine(options.threads), "rows": [asdict(row) for row in rows]}
        Path(options.json).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


class Bench:
    def __init__(self, directory: Path, threads: int, prompt_tokens: int) -> None:
        import torch

        from serving.engine.load import load_engine

        torch.set_num_threads(threads)
        # Every prompt is new, so that nothing of it is known.
        self._engine: Engine = load_engine(directory, kv_bytes=KV_BYTES, exact=False, prefix_cache=False)
        self._prompt_tokens = prompt_tokens
        self._draw = random.Random(0)  # noqa: S311
        self._num_submitted = 0

    def first_token_alone(self) -> float:
        start = time.perf_counter()
        name = self._submit(self._prompt_tokens, 1)
        while name not in self._step():
            pass
        return time.perf_counter() - start

    def round(self, num_streams: int, slowdown: float | None) -> Round:
        self._limit(slowdown)
        # More than a limit could ever need; what is left is cancelled.
        streams = [self._submit(STREAM_PROMPT_TOKENS, 6000) for _ in range(num_streams)]
        started: set[str] = set()
        while len(started) < num_streams:
            started |= self._step()
        idle = self._gaps(streams, lambda step, _: step >= IDLE_STEPS)
        start = time.perf_counter()
        name = self._submit(self._prompt_tokens, 1)
        beside = self._gaps(streams, lambda _, arrived: name in arrived)
        first_token_s = time.perf_counter() - start
        self._end(streams)
        return Round(sorted(idle), sorted(beside), first_token_s)

    def _submit(self, prompt_tokens: int, new_tokens: int) -> str:
        from serving.engine.requests import GenerateRequest, SamplingParams

        self._num_submitted += 1
        ids = self._draw.choices(range(2, self._engine.model.spec.vocab_size), k=prompt_tokens)
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0, seed=0, ignore_eos=True)
        name = str(self._num_submitted)
        self._engine.submit(GenerateRequest(request_id=name, prompt_ids=ids, sampling=sampling))
        return name

    def _limit(self, slowdown: float | None) -> None:
        """Between rounds nothing runs, so the limits may change."""
        scheduler = self._engine._scheduler
        scheduler.limits = replace(scheduler.limits, prefill_slowdown=slowdown)

    def _step(self) -> set[str]:
        """Who got a token."""
        return {event.request_id for event in self._engine.step().events}

    def _gaps(self, streams: Sequence[str], is_over: Callable[[int, set[str]], bool]) -> list[float]:
        last = dict.fromkeys(streams, time.perf_counter())
        gaps: list[float] = []
        arrived: set[str] = set()
        num_steps = 0
        while not is_over(num_steps, arrived):
            arrived = self._step()
            now = time.perf_counter()
            num_steps += 1
            for name in streams:
                if name in arrived:
                    gaps.append(now - last[name])
                    last[name] = now
        return gaps

    def _end(self, streams: Sequence[str]) -> None:
        from serving.engine.requests import CancelRequest

        for name in streams:
            self._engine.cancel(CancelRequest(request_id=name))
        while self._engine.has_work:
            self._engine.step()


def p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]


def machine(threads: int) -> dict[str, object]:
    """Load is who else wants the processor: above `threads` the figures are not the engine's alone."""
    return {"threads": threads, "cores": os.cpu_count(), "load_1min": os.getloadavg()[0]}


def _row(num_streams: int, slowdown: float | None, rounds: Sequence[Round], alone_ms: float) -> Row:
    def over(figure: Callable[[Round], float]) -> float:
        return median(figure(one) for one in rounds)

    return Row(
        num_streams=num_streams,
        slowdown=slowdown,
        idle_p50_ms=1e3 * over(lambda one: median(one.idle)),
        idle_p99_ms=1e3 * over(lambda one: p99(one.idle)),
        beside_p50_ms=1e3 * over(lambda one: median(one.beside)),
        beside_p99_ms=1e3 * over(lambda one: p99(one.beside)),
        ratio_p50=over(lambda one: median(one.beside) / median(one.idle)),
        ratio_p99=over(lambda one: p99(one.beside) / p99(one.idle)),
        first_token_ms=1e3 * over(lambda one: one.first_token_s),
        first_token_alone_ms=alone_ms,
    )


def _line(row: Row) -> str:
    limit = "none" if row.slowdown is None else f"{row.slowdown:g}"
    idle = f"{row.idle_p50_ms:>9.1f} {row.idle_p99_ms:>5.1f}"
    beside = f"{row.beside_p50_ms:>11.1f} {row.beside_p99_ms:>5.0f}"
    ratios = f"{row.ratio_p50:>10.2f} {row.ratio_p99:>5.2f}"
    first = f"{row.first_token_ms:>8.0f}, alone {row.first_token_alone_ms:.0f}"
    return f"{row.num_streams:>7} {limit:>5} {idle}  {beside}  {ratios}  {first}"


def _slowdowns(text: str) -> list[float | None]:
    return [None if part == "none" else float(part) for part in text.split(",")]


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8])
    parser.add_argument("--slowdowns", type=_slowdowns, default=[2.5, None], help="limits to compare; none: no limit")
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--model-directory", type=Path, help="default: the newest prepared model in the cache")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
