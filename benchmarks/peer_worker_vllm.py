"""vLLM's offline engine, measured by commands on stdin: its side of `peers.py`, run in its own environment.

    ENV/bin/python benchmarks/peer_worker_vllm.py MODEL_DIRECTORY

Speaks the protocol of `peer_workers.py`. Imports nothing of Causerie.
"""
# vLLM is not installed where types are checked.
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main(argv: list[str]) -> None:
    # vLLM logs to stdout, and its processes inherit it.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch
    from vllm import LLM

    llm = LLM(model=argv[0], dtype="bfloat16", max_model_len=4096, max_num_seqs=64, disable_log_stats=True)
    answers.write(json.dumps({"torch": torch.__version__}) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(generate(llm.llm_engine, json.loads(line))) + "\n")


def generate(engine: Any, task: dict[str, Any]) -> dict[str, float]:
    """The loop of `LLM.generate`, watched: decoding counts from when every stream has its first token."""
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(max_tokens=task["new_tokens"], temperature=0, ignore_eos=True)
    num_of: dict[str, int] = {}
    decode_start, num_at_start = 0.0, 0
    start = time.perf_counter()
    for index, prompt in enumerate(task["prompts"]):
        engine.add_request(f"{task['name']}-{index}", TokensPrompt(prompt_token_ids=prompt), sampling)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if not output.outputs[0].token_ids:
                continue
            num_of[output.request_id] = len(output.outputs[0].token_ids)
        if not decode_start and len(num_of) == len(task["prompts"]):
            decode_start, num_at_start = time.perf_counter(), sum(num_of.values())
    end = time.perf_counter()
    num_decoded = sum(num_of.values()) - num_at_start
    return {"prefill_s": decode_start - start, "decode_s": end - decode_start, "num_decoded": num_decoded}


if __name__ == "__main__":
    main(sys.argv[1:])
