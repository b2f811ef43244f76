"""Our engine as a library in a process of its own, measured by commands on stdin: our side of `peers.py`.

    python -m benchmarks.peer_worker_ours MODEL_DIRECTORY THREADS

Speaks the protocol of `peer_workers.py`, as `peer_worker_vllm.py` does. Uses only the engine's public interface.
"""

from __future__ import annotations

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
    from serving.engine.engine import load_engine

    engine = load_engine(directory, kv_bytes=KV_BYTES, exact=False)
    ready = {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernel": str(engine.kernel_name),
        "weight_bytes_per_token": weight_bytes_per_token(directory),
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
    """Bytes a second of a stream read from memory with the threads that the engine has."""
    import torch

    data = torch.ones(BANDWIDTH_BYTES // 4, dtype=torch.float32)
    best = math.inf
    for _ in range(BANDWIDTH_PASSES):
        for reduce in (torch.sum, torch.amax):
            start = time.perf_counter()
            reduce(data)
            best = min(best, time.perf_counter() - start)
    return {"bytes_per_s": BANDWIDTH_BYTES / best}


def weight_bytes_per_token(directory: Path) -> int:
    """Bytes of weights that one decoded token cannot do without reading; copies and look-up tables not counted.

    The linears and their scales as stored; the zero points of a symmetric grid are one constant. The head, tied to
    the embedding and stored in 16 bits, is served in 8 bits.
    """
    from safetensors import safe_open

    total, head, embedding = 0, 0, 0
    for path in directory.glob("*.safetensors"):
        with safe_open(str(path), framework="pt") as file:
            names: list[str] = list(file.keys())
            for name in names:
                tensor = file.get_slice(name)
                count = math.prod(tensor.get_shape())
                if name.endswith("embed_tokens.weight"):
                    embedding = count
                elif name == "lm_head.weight":
                    head = count
                elif not name.endswith((".qzeros", ".g_idx")):
                    total += count * {"I32": 4, "F32": 4, "F16": 2, "BF16": 2}[tensor.get_dtype()]
    return total + (head or embedding)


if __name__ == "__main__":
    main(sys.argv[1:])
