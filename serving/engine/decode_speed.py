"""How fast one stream decodes in the engine: what the quantisation report says of a model before and after.

A few seconds on one machine, beside whatever else runs there: good for a ratio, not for a benchmark. `measure_in_child`
runs `python -m serving.engine.decode_speed DIRECTORY ...`, so that the memory of whole models goes back afterwards.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from quant.errors import CheckpointError
from quant.report.quantization_report import MOST_DECODED_BYTES, DecodeSpeed
from serving.child_process import child_environment, python_command
from serving.engine.engine import Engine
from serving.engine.load import load_engine
from serving.engine.requests import CancelRequest, GenerateRequest, SamplingParams

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 16
MAX_TOKENS = 64
# Decoding stops here even if fewer than MAX_TOKENS came: a large model on a small machine must not hold up its report.
TIME_LIMIT_S = 1.5
# Starting, loading and decoding; more than ten times what a small model takes.
CHILD_TIMEOUT_S = 120.0
_KV_BYTES = 64 * 1024 * 1024


def measure_in_child(directories: Sequence[Path]) -> list[DecodeSpeed | None]:
    """One after another, in a process of their own. None, and a log line, for what could not be measured."""
    small = [directory for directory in directories if _weight_bytes(directory) <= MOST_DECODED_BYTES]
    if not small:
        return [None] * len(directories)
    command = python_command("serving.engine.decode_speed", *(str(directory) for directory in small))
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=CHILD_TIMEOUT_S,
            env=child_environment(os.environ),
            check=True,
        )
        found = {Path(line["directory"]): line["speed"] for line in map(json.loads, result.stdout.splitlines())}
        return [DecodeSpeed(**found[directory]) if found.get(directory) else None for directory in directories]
    except (subprocess.SubprocessError, OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("decode_speed_not_measured reason=%s", type(error).__name__)
        return [None] * len(directories)


def main(arguments: Sequence[str]) -> int:
    """A JSON line for each directory; one that cannot be served has no speed."""
    for directory in map(Path, arguments):
        try:
            speed = asdict(measure_decode_speed(directory))
        except CheckpointError as error:
            print(f"{directory}: {error}", file=sys.stderr)
            speed = None
        print(json.dumps({"directory": str(directory), "speed": speed}), flush=True)
    return 0


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


def _weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
