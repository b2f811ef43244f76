"""Time to first token, time between tokens and tokens per second of any OpenAI-compatible server.

python -m benchmarks.serve --base-url http://127.0.0.1:8000/v1 --streams 1 8 32
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import urllib.request
from dataclasses import asdict

from benchmarks.load import Load, LoadResult, run_load

HEADER = f"{'streams':>7} {'tokens/s':>9} {'decode/s':>9} {'ttft p50':>9} {'ttft max':>9} {'gap p50':>9} {'gap p99':>9}"


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    model = options.model or first_model(options.base_url, options.api_key)
    print(f"{options.base_url}, model {model}, {options.max_tokens} new tokens, greedy")
    print(HEADER)
    results: list[LoadResult] = []
    for num_streams in options.streams:
        load = Load(
            options.base_url,
            model,
            num_streams,
            options.max_tokens,
            options.prompt_words,
            options.ignore_eos,
            options.api_key,
        )
        rounds = [asyncio.run(run_load(load, round_index=i)) for i in range(options.rounds)]
        best = sorted(rounds, key=lambda result: result.tokens_per_s)[len(rounds) // 2]
        results.append(best)
        print(table_row(best), flush=True)
    if options.json:
        json.dump([asdict(result) for result in results], sys.stdout, indent=2)
        print()
    return 0


def first_model(base_url: str, api_key: str | None = None) -> str:
    request = urllib.request.Request(f"{base_url}/models")  # noqa: S310 - the address is the operator's own
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
        return str(json.load(answer)["data"][0]["id"])


def table_row(result: LoadResult) -> str:
    return (
        f"{result.num_streams:>7} {result.tokens_per_s:>9.1f} {result.decode_tokens_per_s:>9.1f} "
        f"{result.ttft_p50_s * 1e3:>6.0f} ms {result.ttft_max_s * 1e3:>6.0f} ms "
        f"{result.gap_p50_s * 1e3:>6.1f} ms {result.gap_p99_s * 1e3:>6.1f} ms"
    )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="with /v1")
    parser.add_argument("--model", help="default: the first one the server lists")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--prompt-words", type=int, default=0, help="words in front of the question, for long prompts")
    parser.add_argument("--rounds", type=int, default=3, help="the median one is printed")
    parser.add_argument(
        "--ignore-eos", action="store_true", help="every answer gets --max-tokens tokens (Causerie, llama.cpp)"
    )
    parser.add_argument("--api-key")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
