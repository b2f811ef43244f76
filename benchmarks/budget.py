"""What a perplexity budget costs in bytes: our search beside simpler ways of spending them, on one source.

    python -m benchmarks.budget SOURCE_DIRECTORY --limit 2 --group-size 64 --json budget.json
    python -m benchmarks.budget SOURCE_DIRECTORY --quick

All rows take their linears from the same walks and are measured on the plain path, on both held-out texts: `worst` is
the larger of the two increases. Rows that search stop at the same limit. `--work` keeps the walks for the next run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from quant.budget.order import Refinement, order_refinements, weight_bytes
from quant.budget.search import BudgetSearch, KnownLosses, SearchRun, Walked, carry_texts, units_of
from quant.commands import ServingAccess
from quant.formats.autogptq import read_json
from quant.formats.checkpoint_names import checkpoint_names
from quant.method.gptq import GptqOptions
from quant.options import QuantizeOptions
from quant.progress import LineProgress
from quant.run.texts import prepare_texts
from quant.walk.layer_files import WorkDirectory
from quant.walk.layer_walk import quantize_to_disk, settle_group_size

SAMPLES, QUICK_SAMPLES = 128, 16
QUICK_WINDOWS = 4


@dataclass(frozen=True, slots=True)
class Row:
    """linears_mb: packed, in 10^6 bytes; file_mb: with everything that stays plain. Increases in percent."""

    name: str
    linears_mb: float
    file_mb: float
    conversations: float
    prose: float
    trials: int

    @property
    def worst(self) -> float:
        return max(self.conversations, self.prose)


def main(argv: list[str] | None = None) -> int:
    given = _parse(argv)
    torch.set_num_threads(given.threads)
    options = QuantizeOptions(
        gptq=GptqOptions(group_size=given.group_size),
        samples=given.samples or (QUICK_SAMPLES if given.quick else SAMPLES),
    )
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(given.source, work, options, windows=QUICK_WINDOWS if given.quick else None)
        rows = bench.rows(given.limit)
    print(f"{'':<38} linears   file  conversations   prose  trials")
    for row in rows:
        print(
            f"{row.name:<38} {row.linears_mb:>4.1f} MB {row.file_mb:>5.1f} MB {row.conversations:>+9.2f} % "
            f"{row.prose:>+7.2f} % {row.trials:>5}"
        )
    if given.json is not None:
        record = {"limit": given.limit, "options": str(options), "rows": [asdict(row) for row in rows]}
        given.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    kept = all(row.worst <= given.limit for row in rows if row.trials)
    return 0 if kept else 1


class Bench:
    """The walks of one source, and every way of choosing from them."""

    def __init__(self, source: Path, work: Path, options: QuantizeOptions, windows: int | None) -> None:
        """windows: of each held-out text; None for all."""
        access, progress = ServingAccess(), LineProgress(sys.stderr)
        layers = access.open(source)
        options = replace(options, gptq=settle_group_size(layers, options.gptq))
        texts = prepare_texts(access.encoder(source), options, layers.max_positions)
        names = checkpoint_names(read_json(source / "config.json"))
        directory = WorkDirectory(work, names, options.checkpoint_format)
        reports = quantize_to_disk(layers, texts.calibration, options.gptq, options.choice_of, directory, progress)
        held_out = [text.windows[:windows] for text in texts.held_out]
        base = Walked(directory, reports)
        run = SearchRun(layers, base, texts.calibration, held_out, options, progress)
        self._end_bytes = layers.end_bytes()
        self._search = BudgetSearch(run)
        # With the linears' own errors as their harm.
        self._unmeasured = units_of([walk.layers for walk in self._search.walks], layers.outline())
        source_losses = run.record.measured(
            "source", lambda: carry_texts(run, lambda index: layers.layer(index).to(torch.float32), "source")
        )
        self._known = KnownLosses(source_losses, self._search.losses((), "all as given"), [0.0] * len(held_out))

    def rows(self, limit: float) -> list[Row]:
        given = self._search.walks[0].layers[0].linears[0]
        name = f"all {given.bits} bits, group {given.group_size}"
        fixed = [self._row(name, (), trials=0)]
        for walk in range(1, len(self._search.walks)):
            linear = self._search.walks[walk].layers[0].linears[0]
            name = f"all {linear.bits} bits, group {linear.group_size}"
            fixed.append(self._row(name, self._all_from(walk), trials=0))
        return [
            *fixed,
            self._searched("worst error first, straight to the best", self._worst_first(), limit),
            self._searched("error removed for each byte", order_refinements(self._unmeasured), limit),
            self._searched("measured harm for each byte (ours)", self._search.order, limit),
        ]

    def _searched(self, name: str, order: Sequence[Refinement], limit: float) -> Row:
        found = self._search.find_along(order, limit, self._known)
        return self._row(name, found.refinements, trials=len(found.trials) - 1)

    def _row(self, name: str, refinements: Sequence[Refinement], trials: int) -> Row:
        losses = self._search.losses(refinements, name)
        increases = [100 * math.expm1(loss - source) for loss, source in zip(losses, self._known.source, strict=True)]
        linears = weight_bytes(self._search.units, refinements)
        return Row(name, linears / 1e6, (linears + self._end_bytes) / 1e6, increases[0], increases[1], trials)

    def _all_from(self, walk: int) -> list[Refinement]:
        return [
            Refinement(index, place, 0.0)
            for index, unit in enumerate(self._search.units)
            for place, rung in enumerate(unit.rungs)
            if rung.walk == walk
        ]

    def _worst_first(self) -> list[Refinement]:
        """By the error of the linears' outputs alone, whatever their size."""
        worst = sorted(enumerate(self._unmeasured), key=lambda one: -one[1].rungs[0].harm)
        return [Refinement(index, len(unit.rungs) - 1, 0.0) for index, unit in worst if len(unit.rungs) > 1]


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE_DIRECTORY")
    parser.add_argument("--limit", type=float, default=2.0, help="in percent")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, help=f"of calibration text (default: {SAMPLES})")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_SAMPLES} samples unless given, and a quarter of the held-out texts",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--work", type=Path, metavar="DIR", help="where walks and measurements stay; same options only")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
