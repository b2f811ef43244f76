"""What judging answers while they stream costs: throughput of 8 streams, and how much later the first text is seen.

    python -m benchmarks.stream_filter

Two servers of the same model stand beside each other, one judging what it generates and one not (input is judged by
both); rounds alternate between them, and every figure is the median of rounds. With --data, the share of ordinary
answers that the filter would stop is counted as well, on answers of sft/val fed in small pieces.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from benchmarks.load import Load, run_load
from benchmarks.serve import first_model
from benchmarks.servers import causerie, resident_mb
from moderation.corpus import MEANT_AS_HARMFUL
from moderation.policy import Policy, load_policy
from moderation.rows import answers
from moderation.stream_filter import JudgingFilter

MODES = ("off", "block")
ANSWER_FILE = "sft/val.jsonl.gz"
PIECE_CHARACTERS = 4


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    rows = _serve(options)
    if options.data:
        rows |= stopped_answers(options.data, options.answers)
    for name, value in rows.items():
        print(f"{name:<32} {value:>10.2f}")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


def _serve(options: argparse.Namespace) -> dict[str, float]:
    flag, threads = "--moderation-output-mode", options.threads
    with causerie(flag, "off", threads=threads) as off, causerie(flag, "block", threads=threads) as on:
        bases = {"off": off.base_url, "block": on.base_url}
        rows = first_text(bases, options.requests) | throughput(bases, options)
        rows["gateway_mb_off"], rows["gateway_mb_on"] = resident_mb(off.pid), resident_mb(on.pid)
    return rows


def first_text(bases: Mapping[str, str], num_requests: int) -> dict[str, float]:
    """Milliseconds to the first text that a client sees, idle server, one request after the other."""
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for index in range(num_requests + 2):
        for mode, base_url in bases.items():
            load = Load(base_url, first_model(base_url), num_streams=1, max_tokens=48, ignore_eos=True)
            seen_s = asyncio.run(run_load(load, round_index=index)).ttft_p50_s
            if index >= 2:
                times[mode].append(1e3 * seen_s)
    off, on = median(times["off"]), median(times["block"])
    return {"first_text_off_ms": off, "first_text_on_ms": on, "first_text_added_ms": on - off}


def throughput(bases: Mapping[str, str], options: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of 8 streams; tokens of answers that the filter ended early are not among them."""
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    for index in range(options.rounds + 1):
        order = MODES if index % 2 else tuple(reversed(MODES))
        for mode in order:
            base_url = bases[mode]
            load = Load(base_url, first_model(base_url), num_streams=8, max_tokens=options.max_tokens, ignore_eos=True)
            result = asyncio.run(run_load(load, round_index=index))
            if index > 0:
                found[mode].append(result.tokens_per_s)
    off, on = median(found["off"]), median(found["block"])
    return {"tokens_per_s_off": off, "tokens_per_s_on": on, "throughput_cost_percent": 100 * (1 - on / off)}


def stopped_answers(data: Path, most: int) -> dict[str, float]:
    """How many ordinary answers end in `content_filter`, in percent."""
    policy = load_policy()
    rows = [row for row in answers(data, ANSWER_FILE)[0] if row.source not in MEANT_AS_HARMFUL][:most]
    stopped = sum(_is_stopped(policy, row.text) for row in rows)
    return {"answers": float(len(rows)), "answers_stopped_percent": 100 * stopped / max(1, len(rows))}


def _is_stopped(policy: Policy, text: str) -> bool:
    stream = JudgingFilter(lambda window: policy.judge_output("", window))
    for start in range(0, len(text), PIECE_CHARACTERS):
        stream.feed(text[start : start + PIECE_CHARACTERS])
        stream.judge()
        if stream.take().is_stopped:
            return True
    stream.end()
    stream.judge()
    return stream.take().is_stopped


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=15, help="for the time to the first text")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--data", type=Path, metavar="DIR")
    parser.add_argument("--answers", type=int, default=1000, help="ordinary answers to filter")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
