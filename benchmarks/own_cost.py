"""What Causerie costs by itself: start, memory, time to first token, and gateway + moderation + SSE over the engine.

python -m benchmarks.own_cost
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from pathlib import Path
from statistics import median, quantiles

from benchmarks.load import TOPICS, Load, run_load
from benchmarks.serve import first_model
from benchmarks.servers import causerie, children_of, resident_mb


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    rows: dict[str, float] = {}
    with causerie(threads=options.threads) as server:
        rows["ready_s"] = server.start_s
        model = first_model(server.base_url)
        rows |= time_to_first_token(server.base_url, model, options.requests)
        rows["http_tokens_per_s"], rows["engine_tokens_per_s"] = gateway_cost(server.base_url, model, options)
        rows["gateway_cost_percent"] = 100 * (1 - rows["http_tokens_per_s"] / rows["engine_tokens_per_s"])
        engine_mb = [resident_mb(child) for child in children_of(server.pid)]
        rows["engine_resident_mb"] = max(engine_mb, default=0.0)
        rows["gateway_resident_mb"] = resident_mb(server.pid)
    for name, value in rows.items():
        print(f"{name:<24} {value:>10.1f}")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


def time_to_first_token(base_url: str, model: str, num_requests: int) -> dict[str, float]:
    """Short prompts one after the other on an idle server, moderation on."""
    load = Load(base_url, model, num_streams=1, max_tokens=4)
    times = [asyncio.run(run_load(load, round_index=i)).ttft_p50_s * 1e3 for i in range(num_requests + 2)][2:]
    return {"ttft_p50_ms": median(times), "ttft_p95_ms": quantiles(times, n=20)[-1]}


def gateway_cost(base_url: str, model: str, options: argparse.Namespace) -> tuple[float, float]:
    """Tokens per second of 8 streams over HTTP and in the engine alone, medians of interleaved rounds."""
    over_http: list[float] = []
    alone: list[float] = []
    engine = EngineAlone(options.model_directory or newest_prepared(), options.threads)
    load = Load(base_url, model, num_streams=8, max_tokens=options.max_tokens, ignore_eos=True)
    for index in range(options.rounds + 1):
        http_result = asyncio.run(run_load(load, round_index=index)).tokens_per_s
        engine_result = engine.tokens_per_s(8, options.max_tokens, index)
        if index > 0:
            over_http.append(http_result)
            alone.append(engine_result)
    return median(over_http), median(alone)


class EngineAlone:
    """The engine as a library in this process, with the same prompts."""

    def __init__(self, directory: Path, threads: int) -> None:
        import torch

        from serving.engine.load import load_engine
        from serving.model.chat_format import ChatFormat, ChatMessage
        from serving.model.tokenizer import ModelTokenizer

        torch.set_num_threads(threads)
        self._engine = load_engine(directory, kv_bytes=512 << 20, exact=False)
        chat_format = ChatFormat.load(directory, ModelTokenizer.load(directory))
        self._prompts = [
            chat_format.render([ChatMessage("user", f"Request {i}: tell me a long and detailed story about {topic}.")])
            for i, topic in enumerate(TOPICS)
        ]

    def tokens_per_s(self, num_streams: int, max_tokens: int, round_index: int) -> float:
        from serving.engine.requests import GenerateRequest, SamplingParams

        sampling = SamplingParams(max_tokens=max_tokens, temperature=0, seed=0, ignore_eos=True)
        start = time.perf_counter()
        for i in range(num_streams):
            prompt = self._prompts[i % len(self._prompts)]
            self._engine.submit(GenerateRequest(request_id=f"{round_index}-{i}", prompt_ids=prompt, sampling=sampling))
        while self._engine.has_work:
            self._engine.step()
        return num_streams * max_tokens / (time.perf_counter() - start)


def newest_prepared() -> Path:
    """The prepared default model in the cache."""
    from serving.models import cache_directory

    found = sorted(cache_directory(os.environ).rglob("quantization_report.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise RuntimeError("no prepared model in the cache; run `causerie serve` once")
    return found[-1].parent


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20, help="for the time to first token")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--model-directory", type=Path, help="default: the newest prepared model in the cache")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
