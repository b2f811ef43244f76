"""What an int8 KV cache saves and costs: bytes of a token, perplexity on the held-out text of the quantisation report.

python -m benchmarks.kv_cache
python -m benchmarks.kv_cache --speed      (milliseconds of a step instead)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.decode_step import decoding_engine, load_sides, step_seconds
from benchmarks.own_cost import newest_prepared
from quant.progress import LineProgress

if TYPE_CHECKING:
    from torch import Tensor

    from quant.report.measure import Agreement, RowLogits
    from serving.engine.prepare import PreparedModel

# (streams, tokens of context)
CASES = ((1, 512), (1, 2048), (8, 512))


@dataclass(frozen=True, slots=True)
class Costs:
    """`int8` compares the predictions with those of the bfloat16 cache."""

    bfloat16_token_bytes: float
    int8_token_bytes: float
    bfloat16_perplexity: float
    int8: Agreement


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    directory = options.model_directory or newest_prepared()
    if options.speed:
        print_speed(load_sides(directory, options.threads)["native"], options.steps, is_cpu_time=options.cpu_time)
        return 0
    costs = measure(directory, options.threads, options.window, options.tokens)
    change = costs.int8.perplexity / costs.bfloat16_perplexity - 1
    print(f"bytes of a token   {costs.bfloat16_token_bytes:,.0f} -> {costs.int8_token_bytes:,.0f}")
    print(f"perplexity         {costs.bfloat16_perplexity:.4f} -> {costs.int8.perplexity:.4f}  {change:+.3%}")
    print(f"top-1 agreement    {costs.int8.top1_agreement:.2%}")
    print(f"mean KL            {costs.int8.mean_kl:.5f} nats")
    if options.json:
        row = {
            "bfloat16_token_bytes": costs.bfloat16_token_bytes,
            "int8_token_bytes": costs.int8_token_bytes,
            "bfloat16_perplexity": costs.bfloat16_perplexity,
            "int8_perplexity": costs.int8.perplexity,
            "top1_agreement": costs.int8.top1_agreement,
            "mean_kl": costs.int8.mean_kl,
        }
        Path(options.json).write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    return 0


def measure(directory: Path, threads: int, window: int, max_tokens: int) -> Costs:
    import torch

    from quant.report.measure import compare
    from serving.engine.kv_blocks import BLOCK_SIZE, KVLayout
    from serving.engine.logits import serving_logits
    from serving.engine.prepare import prepare
    from serving.model.weights import load_decoder

    torch.set_num_threads(threads)
    model = prepare(load_decoder(directory, dtype=torch.bfloat16), exact=False)
    windows = held_out(directory, window, max_tokens)

    def rows_of(*, int8_kv: bool) -> RowLogits:
        # A window is computed whole, once: `compare` asks for all of its rows before it goes on to the next.
        @lru_cache(maxsize=1)
        def whole(index: int) -> Tensor:
            return serving_logits(model, windows[index], int8_kv=int8_kv)

        return lambda index, rows: whole(index)[rows].clone()

    progress = LineProgress(sys.stderr)
    perplexity, (int8,) = compare(windows, rows_of(int8_kv=False), [rows_of(int8_kv=True)], progress, "Measuring")
    token_bytes = [
        KVLayout.of(model.spec, model.dtype, is_int8=is_int8).block_bytes / BLOCK_SIZE for is_int8 in (False, True)
    ]
    return Costs(token_bytes[0], token_bytes[1], perplexity, int8)


def print_speed(model: PreparedModel, num_steps: int, *, is_cpu_time: bool) -> None:
    """Decoding steps on both caches, in turns."""
    print("streams context  bfloat16 ms  int8 ms  ratio   (best of each)")
    for num_streams, context in CASES:
        engines = [decoding_engine(model, num_streams, context, num_steps, int8_kv=int8) for int8 in (False, True)]
        seconds = [[step_seconds(engine, is_cpu_time) for engine in engines] for _ in range(num_steps)]
        plain, int8 = (min(side) * 1e3 for side in zip(*seconds, strict=True))
        print(f"{num_streams:>7} {context:>7} {plain:>12.2f} {int8:>8.2f} {plain / int8:>6.2f}", flush=True)


def held_out(directory: Path, window: int, max_tokens: int) -> Tensor:
    """(windows, window) ids: the text and, with the defaults, the windows of the quantisation report."""
    from quant.commands import ServingAccess
    from quant.run.calibration import BUNDLED_HELD_OUT, bundled_rows, encode_rows, held_out_windows

    ids = encode_rows(bundled_rows(BUNDLED_HELD_OUT), ServingAccess().encoder(directory))
    return held_out_windows(ids, window, max_tokens)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=512, help="tokens that are predicted one after another")
    parser.add_argument("--tokens", type=int, default=16_384, help="at most, of all windows")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--speed", action="store_true", help="time decoding steps instead of predicting text")
    parser.add_argument("--steps", type=int, default=40, help="of each cache and case, in turns, with --speed")
    parser.add_argument("--cpu-time", action="store_true", help="this process's time, for a busy machine")
    parser.add_argument("--model-directory", type=Path, help="default: the newest prepared model in the cache")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
