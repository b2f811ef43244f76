"""How speed and memory grow with the number of streams and with the context.

    python -m benchmarks.growth --json growth.json --images docs/images

The engine as a library in this process, the default model; every point starts from an empty batch. Memory is what the
process has resident while the streams run; a cache is mapped as it is first used and kept as long as its engine, so
each series has an engine of its own and goes from small to large. Plots need matplotlib.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.own_cost import newest_prepared
from benchmarks.servers import resident_mb

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from serving.engine.engine import Engine

STREAMS = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (16, 512, 1024, 2048, 4096, 6144, 8000)
KV_BYTES = 1 << 30
SHORT_PROMPT_TOKENS = 16
WARM_STEPS = 4


@dataclass(frozen=True, slots=True)
class Point:
    """Medians over the steps in which every stream gets one token."""

    num_streams: int
    context: int  # tokens of each stream before the first measured one
    step_ms: float
    tokens_per_s: float  # of all streams
    resident_mb: float
    prefill_s: float  # of all prompts, without streams beside them


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    bench = Bench(options.model_directory or newest_prepared(), options.threads, options.steps)
    print("streams context  step ms  tokens/s  resident MB  prompts s")
    bench.point(STREAMS[-1], SHORT_PROMPT_TOKENS)  # what is made once, is made
    bench.start_anew()
    by_streams = [_shown(bench.point(count, SHORT_PROMPT_TOKENS)) for count in STREAMS]
    bench.start_anew()
    # The last token needs a position, too.
    longest = bench.max_context - options.steps - WARM_STEPS - 1
    by_context = [_shown(bench.point(1, context)) for context in CONTEXTS if context <= longest]
    if options.json:
        record = {
            "machine": {"threads": options.threads, "cores": os.cpu_count(), "load_1min": os.getloadavg()[0]},
            "loaded_mb": bench.loaded_mb,
            "by_streams": [asdict(point) for point in by_streams],
            "by_context": [asdict(point) for point in by_context],
        }
        Path(options.json).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if options.images:
        draw(by_streams, "num_streams", "streams", options.images / "growth_streams.png", label_every=True)
        draw(by_context, "context", "tokens of context", options.images / "growth_context.png", label_every=False)
    return 0


class Bench:
    def __init__(self, directory: Path, threads: int, num_steps: int) -> None:
        import torch

        from serving.engine.load import load_engine

        torch.set_num_threads(threads)
        self._engine: Engine = load_engine(directory, kv_bytes=KV_BYTES, exact=False, prefix_cache=False)
        model = self._engine.model
        self.max_context = self._engine.max_context
        self.loaded_mb = resident_mb(os.getpid())
        self._vocabulary = model.spec.vocab_size
        self._num_steps = num_steps
        self._draw = random.Random(0)  # noqa: S311

    def start_anew(self) -> None:
        """An engine with an unused cache on the same weights."""
        from serving.engine.engine import Engine

        model = self._engine.model
        del self._engine  # before the next one takes memory
        self._engine = Engine(model, kv_bytes=KV_BYTES, tokenizer=None, prefix_cache=False)

    def point(self, num_streams: int, context: int) -> Point:
        prefill_s = self._start(num_streams, context)
        for _ in range(WARM_STEPS):
            self._engine.step()
        times: list[float] = []
        for _ in range(self._num_steps):
            start = time.perf_counter()
            self._engine.step()
            times.append(time.perf_counter() - start)
        step_s = median(times)
        resident = resident_mb(os.getpid())
        self._end(num_streams)
        return Point(num_streams, context, 1e3 * step_s, num_streams / step_s, resident, prefill_s)

    def _start(self, num_streams: int, context: int) -> float:
        """All streams decode on return; seconds that their prompts took."""
        from serving.engine.requests import GenerateRequest, SamplingParams

        sampling = SamplingParams(max_tokens=self.max_context, temperature=0, seed=0, ignore_eos=True)
        for index in range(num_streams):
            ids = self._draw.choices(range(2, self._vocabulary), k=context)
            self._engine.submit(GenerateRequest(request_id=str(index), prompt_ids=ids, sampling=sampling))
        start = time.perf_counter()
        started: set[str] = set()
        while len(started) < num_streams:
            started |= {event.request_id for event in self._engine.step().events}
        return time.perf_counter() - start

    def _end(self, num_streams: int) -> None:
        from serving.engine.requests import CancelRequest

        for index in range(num_streams):
            self._engine.cancel(CancelRequest(request_id=str(index)))
        while self._engine.has_work:
            self._engine.step()


def _shown(point: Point) -> Point:
    figures = f"{point.step_ms:>8.1f} {point.tokens_per_s:>9.0f} {point.resident_mb:>12.0f} {point.prefill_s:>10.2f}"
    print(f"{point.num_streams:>7} {point.context:>7} {figures}", flush=True)
    return point


def draw(points: Sequence[Point], attribute: str, name: str, path: Path, *, label_every: bool) -> None:
    """Tokens a second and resident memory, side by side, each from zero."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    at = [getattr(point, attribute) for point in points]
    speeds, memory = [point.tokens_per_s for point in points], [point.resident_mb for point in points]
    _line(
        axes[0],
        at,
        speeds,
        name,
        "tokens/s, all streams" if label_every else "tokens/s, one stream",
        label_every=label_every,
    )
    _line(axes[1], at, memory, name, "resident memory, MB", label_every=label_every)
    figure.savefig(path, dpi=110, pil_kwargs={"optimize": True})
    pyplot.close(figure)


def _line(axes: Axes, at: Sequence[float], values: Sequence[float], x: str, y: str, *, label_every: bool) -> None:
    axes.plot(at, values, marker="o", color="#1f6f8b")
    if label_every:
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, [f"{value:g}" for value in at])
    else:
        axes.set_xticks(range(0, 8193, 2048), [f"{value:,}" for value in range(0, 8193, 2048)])
    axes.set_ylim(0, 1.15 * max(values))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="measured at every point")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--model-directory", type=Path, help="default: the newest prepared model in the cache")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--images", type=Path, metavar="DIR")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
