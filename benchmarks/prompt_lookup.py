"""On which texts prompt lookup pays: one stream with and without guesses, in turns, in one process.

    python -m benchmarks.prompt_lookup --json lookup.json

The default model's engine as a library. "chat" asks the first questions of the quantisation report's held-out text,
"repeat" asks to say an answer of that text again; greedy, and drawn at temperature 0.7. Ratios are of the whole
answers' times; more than one stream in a step guesses less, so this is where guessing has most to give.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.own_cost import newest_prepared
from quant.run.calibration import BUNDLED_HELD_OUT, bundled_rows

if TYPE_CHECKING:
    from serving.engine.engine import Engine

KV_BYTES = 1 << 28
REPEATED_CHARS = 600


@dataclass(frozen=True, slots=True)
class Row:
    """`ratio` is the time without guesses over that with them: the median of the prompts' ratios."""

    kind: str
    temperature: float
    ratio: float
    guessed_right: float  # of the guessed tokens
    tokens_per_step: float


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    bench = Bench(options.model_directory or newest_prepared(), options.threads, options.new_tokens)
    prompts = questions(options.prompts)
    print("text    temperature  without / with  guessed right  tokens a step")
    rows: list[Row] = []
    for kind, texts in prompts.items():
        for temperature in (0.0, 0.7):
            row = bench.row(kind, texts, temperature)
            rows.append(row)
            figures = f"{row.ratio:15.2f}  {row.guessed_right:13.0%}  {row.tokens_per_step:13.2f}"
            print(f"{kind:7} {temperature:12.1f} {figures}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    return 0


def questions(count: int) -> dict[str, list[str]]:
    conversations = [row.messages for row in bundled_rows(BUNDLED_HELD_OUT) if len(row.messages) > 1][:count]
    return {
        "chat": [messages[0].content for messages in conversations],
        "repeat": [
            f"Repeat this text word for word:\n\n{messages[1].content[:REPEATED_CHARS]}" for messages in conversations
        ],
    }


class Bench:
    """Two engines on the same weights."""

    def __init__(self, directory: Path, threads: int, new_tokens: int) -> None:
        import torch

        from serving.engine.engine import Engine
        from serving.engine.load import load_engine
        from serving.model.chat_format import ChatFormat
        from serving.model.tokenizer import ModelTokenizer

        torch.set_num_threads(threads)
        tokenizer = ModelTokenizer.load(directory)
        self._chat_format = ChatFormat.load(directory, tokenizer)
        self._new_tokens = new_tokens
        without = load_engine(directory, kv_bytes=KV_BYTES, exact=False, prefix_cache=False)
        guessing = Engine(without.model, kv_bytes=KV_BYTES, tokenizer=tokenizer, prefix_cache=False, prompt_lookup=True)
        self._engines = (without, guessing)
        self._num_runs = 0

    def row(self, kind: str, texts: Sequence[str], temperature: float) -> Row:
        guessing = self._engines[1]
        before = guessing.stats()
        ratios: list[float] = []
        for number, text in enumerate([texts[0], *texts]):
            seconds = {engine: self._answer(engine, text, temperature) for engine in self._in_turn(number)}
            if number == 0:  # the first one warms up
                before = guessing.stats()
                continue
            ratios.append(seconds[self._engines[0]] / seconds[guessing])
        after = guessing.stats()
        guessed = after.num_guessed_tokens - before.num_guessed_tokens
        right = after.num_guessed_right - before.num_guessed_right
        steps = after.num_steps - before.num_steps
        tokens = after.num_generated_tokens - before.num_generated_tokens
        return Row(kind, temperature, median(ratios), right / max(guessed, 1), tokens / max(steps, 1))

    def _in_turn(self, number: int) -> Sequence[Engine]:
        return self._engines if number % 2 else self._engines[::-1]

    def _answer(self, engine: Engine, text: str, temperature: float) -> float:
        """Seconds of decoding, from the first token to the last."""
        from serving.engine.requests import GenerateRequest, SamplingParams
        from serving.model.chat_format import ChatMessage

        self._num_runs += 1
        ids = self._chat_format.render([ChatMessage("user", text)], add_generation_prompt=True)
        sampling = SamplingParams(max_tokens=self._new_tokens, temperature=temperature, seed=0, ignore_eos=True)
        engine.submit(GenerateRequest(request_id=str(self._num_runs), prompt_ids=ids, sampling=sampling))
        while not engine.step().events:
            pass
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
        return time.perf_counter() - start


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12, help="of each kind (12)")
    parser.add_argument("--new-tokens", type=int, default=128, help="of each answer (128)")
    parser.add_argument("--threads", type=int, default=2, help="(2)")
    parser.add_argument("--model-directory", type=Path, help="default: the newest prepared model in the cache")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
