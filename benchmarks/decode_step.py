"""One engine step with the native kernels and with torch's, in turns in one process.

python -m benchmarks.decode_step --threads 1
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.own_cost import newest_prepared

if TYPE_CHECKING:
    from serving.engine.engine import Engine
    from serving.engine.prepare import PreparedModel

# (streams, tokens of context)
CASES = ((1, 16), (1, 512), (2, 64), (8, 64), (32, 64))
KV_BYTES = 256 << 20


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    sides = load_sides(options.model_directory or newest_prepared(), options.threads)
    rows: list[dict[str, float]] = []
    print("streams context  torch ms  native ms  ratio   (best of each)")
    for num_streams, context in CASES:
        best = {name: float("inf") for name in sides}
        engines = {name: decoding_engine(model, num_streams, context, options.steps) for name, model in sides.items()}
        for _ in range(options.steps):
            for name, engine in engines.items():
                best[name] = min(best[name], step_seconds(engine, options.cpu_time) * 1e3)
        ratio = best["torch"] / best["native"]
        print(f"{num_streams:>7} {context:>7} {best['torch']:>9.2f} {best['native']:>10.2f} {ratio:>6.2f}", flush=True)
        rows.append({"streams": num_streams, "context": context, **{f"{k}_ms": v for k, v in best.items()}})
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


def load_sides(directory: Path, threads: int) -> dict[str, PreparedModel]:
    import torch

    from serving.engine.prepare import prepare
    from serving.model.weights import load_decoder

    torch.set_num_threads(threads)
    decoder = load_decoder(directory, dtype=torch.bfloat16)
    return {name: prepare(decoder, exact=False, native=name == "native") for name in ("torch", "native")}


def decoding_engine(
    model: PreparedModel, num_streams: int, context: int, num_steps: int, *, int8_kv: bool = False
) -> Engine:
    """An engine with every stream's prompt computed."""
    from serving.engine.engine import Engine
    from serving.engine.requests import GenerateRequest, SamplingParams

    engine = Engine(model, kv_bytes=KV_BYTES, tokenizer=None, int8_kv=int8_kv)
    draw = random.Random(0)  # noqa: S311
    sampling = SamplingParams(max_tokens=num_steps + 64, temperature=0, seed=0, ignore_eos=True)
    for index in range(num_streams):
        prompt = draw.choices(range(2, model.spec.vocab_size), k=context)
        engine.submit(GenerateRequest(request_id=str(index), prompt_ids=prompt, sampling=sampling))
    started: set[str] = set()
    while len(started) < num_streams:
        started |= {event.request_id for event in engine.step().events}
    return engine


def step_seconds(engine: Engine, is_cpu_time: bool) -> float:
    """CPU time leaves out what other processes took, but counts the spinning of threads."""
    clock = time.process_time if is_cpu_time else time.perf_counter
    start = clock()
    engine.step()
    return clock() - start


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of each side and case, in turns")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--cpu-time", action="store_true", help="this process's time, for a busy machine")
    parser.add_argument("--model-directory", type=Path, help="default: the newest prepared model in the cache")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
