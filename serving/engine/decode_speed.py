"""How fast one stream decodes in the engine: what the quantisation report says of a model before and after.

A few seconds on one machine, beside whatever else runs there: good for a ratio, not for a benchmark.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from quant.report import DecodeSpeed
from serving.engine.engine import Engine, load_engine
from serving.engine.requests import CancelRequest, GenerateRequest, SamplingParams

PROMPT_TOKENS = 16
MAX_TOKENS = 128
# Decoding stops here even if fewer than MAX_TOKENS came: a large model on a small machine must not hold up its report.
TIME_LIMIT_S = 2.0
_KV_BYTES = 64 * 1024 * 1024


def measure_decode_speed(directory: Path, clock: Callable[[], float] = time.perf_counter) -> DecodeSpeed:
    """Load `directory` into an engine, plain weights in bf16, and decode greedily for at most about two seconds.

    The engine is gone when this returns; while it runs, the process holds it beside what it held before. Raises
    CheckpointError for a directory that cannot be served.
    """
    started = clock()
    engine = load_engine(directory, kv_bytes=_KV_BYTES, exact=False, prefix_cache=False)
    load_seconds = clock() - started
    _decode(engine, "warm-up", PROMPT_TOKENS, clock)
    tokens, seconds = _decode(engine, "measured", MAX_TOKENS, clock)
    return DecodeSpeed(load_seconds, tokens / seconds, torch.get_num_threads())


def _decode(engine: Engine, request_id: str, max_tokens: int, clock: Callable[[], float]) -> tuple[int, float]:
    """Tokens after the first one, and the seconds they took: the first is the prompt's."""
    sampling = SamplingParams(max_tokens=max_tokens + 1, temperature=0, seed=0, ignore_eos=True)
    prompt = [1 + index % (engine.model.spec.vocab_size - 1) for index in range(PROMPT_TOKENS)]
    engine.submit(GenerateRequest(request_id=request_id, prompt_ids=prompt, sampling=sampling))
    engine.step()
    started, before = clock(), engine.stats().num_generated_tokens
    while engine.has_work and clock() - started < TIME_LIMIT_S:
        engine.step()
    tokens, seconds = engine.stats().num_generated_tokens - before, clock() - started
    if engine.has_work:
        engine.cancel(CancelRequest(request_id=request_id))
        engine.step()
    return tokens, seconds
