"""Our engine as a library in a process of its own, measured by commands on stdin: our side of `peers.py`.

    python -m benchmarks.peer_worker_ours MODEL_DIRECTORY THREADS

Speaks the protocol of `peer_workers.py`, as `peer_worker_vllm.py` does. Uses only the engine's public interface.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.engine.engine import Engine

KV_BYTES = 1 << 30
# Far beyond any cache; read several times, the fastest counts.
BANDWIDTH_BYTES, BANDWIDTH_PASSES = 1 << 30, 5


def main(argv: list[str]) -> None:
    directory, threads = Path(argv[0]), int(argv[1])
    # Whatever else prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(threads)
    from serving.engine.load import load_engine

    engine = load_engine(directory, kv_bytes=KV_BYTES, exact=False)
    gc.collect()
    gc.freeze()  # as the engine's own process does
    ready = {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernel": str(engine.kernel_name),
        "weight_bytes_per_token": engine.model.weight_bytes() or 0,  # 0: not all native
    }
    answers.write(json.dumps(ready) + "\n")
    for line in sys.stdin:
        task = json.loads(line)
        answer = read_bandwidth() if task["kind"] == "bandwidth" else generate(engine, task)
        answers.write(json.dumps(answer) + "\n")


def generate(engine: Engine, task: Mapping[str, Any]) -> dict[str, float]:
    """All streams at once, greedy; decoding counts from when every stream has its first token."""
    from serving.engine.requests import GenerateRequest, SamplingParams, TokenEvent

    sampling = SamplingParams(max_tokens=task["new_tokens"], temperature=0, seed=0, ignore_eos=True)
    has_first: set[str] = set()
    decode_start, num_decoded = math.nan, 0
    start = time.perf_counter()
    for index, prompt in enumerate(task["prompts"]):
        engine.submit(GenerateRequest(request_id=f"{task['name']}-{index}", prompt_ids=prompt, sampling=sampling))
    while engine.has_work:
        events = [event for event in engine.step().events if isinstance(event, TokenEvent)]
        if len(has_first) == len(task["prompts"]):
            num_decoded += sum(len(event.token_ids) for event in events)
            continue
        has_first.update(event.request_id for event in events)
        if len(has_first) == len(task["prompts"]):
            decode_start = time.perf_counter()
    end = time.perf_counter()
    return {"prefill_s": decode_start - start, "decode_s": end - decode_start, "num_decoded": num_decoded}


def read_bandwidth() -> dict[str, float]:
    """Bytes a second of a stream read from memory, in pages like the weights', with the threads that the engine has."""
    import torch

    from quant.native.large_pages import reserve

    data = torch.from_numpy(reserve(BANDWIDTH_BYTES)).view(torch.float32).fill_(1.0)
    best = math.inf
    for _ in range(BANDWIDTH_PASSES):
        for reduce in (torch.sum, torch.amax):
            start = time.perf_counter()
            reduce(data)
            best = min(best, time.perf_counter() - start)
    return {"bytes_per_s": BANDWIDTH_BYTES / best}


if __name__ == "__main__":
    main(sys.argv[1:])
