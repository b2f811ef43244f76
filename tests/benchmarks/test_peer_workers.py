from __future__ import annotations

import json
import os
import sys

import pytest

from benchmarks.peer_workers import Generation, WorkerError, parse_bench, random_prompts, worker

pytestmark = pytest.mark.unit

# What llama-bench -o json prints, less what is not read.
BENCH = [
    {"build_commit": "0c1e570", "build_number": 1, "n_prompt": 512, "n_gen": 0, "n_depth": 0, "avg_ts": 543.2},
    {"build_commit": "0c1e570", "build_number": 1, "n_prompt": 0, "n_gen": 128, "n_depth": 512, "avg_ts": 156.4},
]
ECHO = """
import json, sys
print(json.dumps({"kernel": "echo"}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    if task["new_tokens"] == 13:
        sys.exit("thirteen")
    answer = {"prefill_s": 1.0, "decode_s": 2.0, "num_decoded": len(task["prompts"]) * task["new_tokens"]}
    print(json.dumps(answer), flush=True)
"""


def test_bench_results_are_read_with_their_depth_and_build() -> None:
    prefill, decode = parse_bench(json.dumps(BENCH))
    assert (prefill.num_prompt, prefill.num_generated, prefill.tokens_per_s) == (512, 0, 543.2)
    assert (decode.num_generated, decode.depth, decode.tokens_per_s) == (128, 512, 156.4)
    assert decode.build == "0c1e570 (1)"


@pytest.mark.parametrize("text", ["", "error: no model", '[{"n_prompt": 1}]', "null", "[1]"])
def test_what_is_no_bench_result_is_refused(text: str) -> None:
    with pytest.raises(WorkerError, match="printed no results"):
        parse_bench(text)


def test_prompts_are_the_same_for_the_same_name_only() -> None:
    prompts = random_prompts(3, 8, "a")
    assert prompts == random_prompts(3, 8, "a")
    assert prompts != random_prompts(3, 8, "b")
    assert [len(prompt) for prompt in prompts] == [8, 8, 8]
    assert prompts[0] != prompts[1]


def test_decoding_speed_leaves_the_prompt_out() -> None:
    assert Generation(prefill_s=100.0, decode_s=2.0, num_decoded=256).decoded_per_s == 128.0


def test_worker_answers_line_by_line() -> None:
    with worker([sys.executable, "-c", ECHO], os.environ) as side:
        assert side.ready == {"kernel": "echo"}
        assert side.generate(4, 16, 32, seed=0) == Generation(1.0, 2.0, 128)
        assert side.generate(1, 16, 2, seed=0).num_decoded == 2


def test_worker_that_ends_says_its_last_words() -> None:
    with worker([sys.executable, "-c", ECHO], os.environ) as side, pytest.raises(WorkerError, match="thirteen"):
        side.generate(1, 1, 13, seed=0)


def test_worker_that_does_not_start_is_an_error() -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(WorkerError, match="no such model"), worker(command, os.environ):
        pass
