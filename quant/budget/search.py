"""The search for a perplexity budget, with real walks and measurements behind `quant.budget.order`.

Each way of storing a linear is walked once for the whole model, and every mixture takes its linears from these walks
as they are: a trial measures exactly what would be written. All of it lies in the work directory of the first walk, so
that a search that was interrupted goes on where it stopped. `quant.budget.attempts` makes results of what is found.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quant.budget.harm import HARM_TOKENS, HARM_WINDOWS, measure_harm
from quant.budget.order import (
    MAX_GIVEN_BACK,
    MAX_TRIALS,
    Refinement,
    Rung,
    SearchResult,
    Unit,
    order_refinements,
    packed_bytes,
    rungs_of,
    search_budget,
    weight_bytes,
    with_harm,
)
from quant.budget.record import BudgetRecord
from quant.method.matrix import QuantizedMatrix
from quant.options import LinearChoice, QuantizeOptions
from quant.progress import ProgressSink
from quant.report.measure import PlainPath, dequantized, mean_log_loss
from quant.walk.layer_files import WorkDirectory
from quant.walk.layer_source import LayerSource
from quant.walk.layer_walk import insert_matrices, quantize_to_disk
from quant.walk.quantize_model import LayerReport, LinearReport

SMALL_GROUP = 32
# At 8 bits hardly anything is lost: a few samples do, and settling codes again gains nothing.
EIGHT_BIT_SAMPLES = 16
# Results that are made and measured, each with a lower aim than the one before.
MAX_ATTEMPTS = 3
# Linears that the engine multiplies as one: of different widths they would lose their fast product.
FUSED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True, slots=True)
class Walked:
    """Every layer quantised in one way."""

    work: WorkDirectory
    layers: Sequence[LayerReport]


@dataclass(frozen=True, slots=True)
class SearchRun:
    """What a search works on.

    base:        the walk without refinements; the search's own files lie in its directory
    calibration: (samples, tokens) ids; texts: (windows, tokens) ids of each held-out text
    options:     of `base`, with their group size settled
    """

    source: LayerSource
    base: Walked
    calibration: Tensor
    texts: Sequence[Tensor]
    options: QuantizeOptions
    progress: ProgressSink

    @property
    def record(self) -> BudgetRecord:
        """What was measured with these texts."""
        digest = hashlib.sha256(b"".join(windows.numpy().tobytes() for windows in self.texts))
        return BudgetRecord(self.base.work.path / f"measured-{digest.hexdigest()[:12]}.json")


@dataclass(frozen=True, slots=True)
class KnownLosses:
    """Mean negative log-likelihood of each text, nats per token, measured already.

    base:  without refinements, as a trial measures it: plain path, the source's embeddings and head
    added: what the result has more than that, served and with its own embeddings and head
    """

    source: Sequence[float]
    base: Sequence[float]
    added: Sequence[float]

    def percent(self, losses: Sequence[float]) -> float:
        """The increase of perplexity that a mixture with these losses on the plain path will have; the worst text's."""
        texts = zip(losses, self.added, self.source, strict=True)
        return max(100 * math.expm1(loss + added - source) for loss, added, source in texts)


class BudgetSearch:
    """Holds the walks of one source, and what was measured with them."""

    def __init__(self, run: SearchRun) -> None:
        """Walks the source once for each way of storing a linear, and measures every unit's harm."""
        self._run, self._record = run, run.record
        self.walks = [run.base, *(self._walk(options) for options in rung_options(run.options, run.source.outline()))]
        units = units_of([walk.layers for walk in self.walks], run.source.outline())
        harm = self._record.measured(
            "harm", lambda: measure_harm(run.source, run.base.work, units, run.calibration, run.progress)
        )
        self.units = with_harm(units, harm)
        self.order = order_refinements(self.units)
        self._num_trials = 0

    def find(self, limit_percent: float, known: KnownLosses) -> SearchResult:
        """The smallest file that keeps the limit in trials. Raises BudgetUnreachableError if none does."""
        return self.find_along(self.order, limit_percent, known)

    def find_along(self, order: Sequence[Refinement], limit_percent: float, known: KnownLosses) -> SearchResult:
        """Likewise, along another order."""

        def increase_of(refinements: Sequence[Refinement]) -> float:
            return self._try(refinements, known)

        base, least = known.percent(known.base), known.percent(known.source)
        return search_budget(self.units, order, limit_percent, base, increase_of, least)

    def _try(self, refinements: Sequence[Refinement], known: KnownLosses) -> float:
        """In percent over the source, with what the path that serves adds; says on `progress` what it tries."""
        self._num_trials += 1
        size = weight_bytes(self.units, refinements) / 1e6
        stage = f"trial {self._num_trials}: {describe(self.units, refinements)}, {size:,.1f} MB"
        increase = known.percent(self.losses(refinements, stage))
        self._run.progress.update(f"{stage}: {increase:+.2f} %", 1, 1)
        return increase

    def losses(self, refinements: Sequence[Refinement], stage: str) -> Sequence[float]:
        """Of each text on the plain path: mean negative log-likelihood, nats per token. Measured once."""
        rungs = rungs_of(self.units, refinements)
        return self._record.measured(f"losses {self._mark(refinements)}", lambda: self._carry_texts(rungs, stage))

    def mixture(self, refinements: Sequence[Refinement]) -> Walked:
        """As a walk of its own, its layers on disk like any other's."""
        base = self._run.base.work
        work = base.within(f"mixture-{self._mark(refinements)}")
        rungs = rungs_of(self.units, refinements)
        for index in range(self._run.source.num_layers):
            if not work.has(index):
                report, matrices = self._mixed_layer(index, rungs)
                work.write(report, matrices)
        work.link_others(base)
        return Walked(work, [work.report(index) for index in range(self._run.source.num_layers)])

    def _walk(self, options: QuantizeOptions) -> Walked:
        run, is_short = self._run, options.gptq.bits == 8
        calibration = run.calibration[:EIGHT_BIT_SAMPLES] if is_short else run.calibration
        work = run.base.work.within(f"bits-{options.gptq.bits}-group-{options.gptq.group_size}")
        layers = quantize_to_disk(run.source, calibration, options.gptq, options.choice_of, work, run.progress)
        return Walked(work, layers)

    def _mark(self, refinements: Sequence[Refinement]) -> str:
        rungs = rungs_of(self.units, refinements)
        walks = [unit.rungs[rung].walk for unit, rung in zip(self.units, rungs, strict=True)]
        return hashlib.sha256(json.dumps(walks).encode()).hexdigest()[:12]

    def _mixed_layer(self, index: int, rungs: Sequence[int]) -> tuple[LayerReport, dict[str, QuantizedMatrix]]:
        """rungs: of every unit. Linears in the order of the first walk."""
        walk_of: dict[str, int] = {}
        for unit, rung in zip(self.units, rungs, strict=True):
            walk_of.update(dict.fromkeys(unit.names, unit.rungs[rung].walk))
        names = [linear.name for linear in self.walks[0].layers[index].linears]
        found = {place: self.walks[place].work.matrices(index) for place in {walk_of[name] for name in names}}
        linears = [self._report_of(index, name, walk_of[name]) for name in names]
        return LayerReport(index, tuple(linears)), {name: found[walk_of[name]][name] for name in names}

    def _report_of(self, index: int, name: str, walk: int) -> LinearReport:
        return next(linear for linear in self.walks[walk].layers[index].linears if linear.name == name)

    def _carry_texts(self, rungs: Sequence[int], stage: str) -> list[float]:
        """Through the mixture with these rungs of all units, layer by layer. Returns what `losses` does."""

        def mixed(index: int) -> nn.Module:
            layer = self._run.source.layer(index)
            insert_matrices(layer, f"model.layers.{index}", self._mixed_layer(index, rungs)[1])
            return dequantized(layer)

        return carry_texts(self._run, mixed, stage)


def carry_texts(run: SearchRun, layer_of: Callable[[int], nn.Module], stage: str) -> list[float]:
    """Mean negative log-likelihood of each text, nats per token. layer_of: index -> layer in float32."""
    with torch.inference_mode():
        paths = [PlainPath(run.source, windows) for windows in run.texts]
        for index in range(run.source.num_layers):
            run.progress.update(stage, index, run.source.num_layers)
            layer = layer_of(index)
            for path in paths:
                path.advance(layer)
        for path in paths:
            path.finish()
        return [mean_log_loss(path.logits, windows) for path, windows in zip(paths, run.texts, strict=True)]


def rung_options(options: QuantizeOptions, outline: nn.Module) -> list[QuantizeOptions]:
    """What is walked beside `options`: with a smaller group everywhere, and with 8 bits everywhere.

    options: with their group size settled. outline: any layer, for the shapes.
    """
    inputs = [module.in_features for module in outline.modules() if isinstance(module, nn.Linear)]
    return _rung_options(options, inputs)


def _rung_options(options: QuantizeOptions, inputs: Iterable[int]) -> list[QuantizeOptions]:
    found: list[QuantizeOptions] = []
    if options.gptq.group_size != SMALL_GROUP and all(size % SMALL_GROUP == 0 for size in inputs):
        found.append(replace(options, gptq=replace(options.gptq, group_size=SMALL_GROUP)))
    if options.gptq.bits < 8:
        found.append(replace(options, gptq=replace(options.gptq, bits=8, refine_sweeps=0)))
    return found


@dataclass(frozen=True, slots=True)
class SearchCost:
    """The most that a search adds to a run that misses its budget.

    walks:       over all of the calibration text; `short_walks` over EIGHT_BIT_SAMPLES of it, without refinement sweeps
    trials:      passes of all held-out text through a model on the plain path
    results:     written and measured as the first one was
    harm_tokens: passed through about half of the layers once for each unit, and through the head
    on_disk:     ways of storing the whole model whose work lies beside that of the first walk at one time
    """

    walks: int
    short_walks: int
    trials: int
    results: int
    harm_tokens: int
    on_disk: tuple[QuantizeOptions, ...]


def search_cost(options: QuantizeOptions, inputs: Iterable[int]) -> SearchCost:
    """Pure. options: with their group size settled. inputs: of every linear of a layer."""
    walked = _rung_options(options, tuple(inputs))
    short = sum(walk.gptq.bits == 8 for walk in walked)
    return SearchCost(
        walks=len(walked) - short,
        short_walks=short,
        trials=MAX_ATTEMPTS * (MAX_TRIALS + MAX_GIVEN_BACK),
        results=MAX_ATTEMPTS,
        harm_tokens=HARM_WINDOWS * HARM_TOKENS,
        # The last is the mixture, which takes no more than the largest of the walks.
        on_disk=(*walked, *walked[-1:]),
    )


def units_of(reports: Sequence[Sequence[LayerReport]], outline: nn.Module) -> list[Unit]:
    """reports: of each walk, without refinements first. outline: any layer, for the shapes.

    A rung's harm is the error of its linears' outputs, added up, until it is measured.
    """
    shapes = {
        name.rpartition(".")[2]: (module.out_features, module.in_features)
        for name, module in outline.named_modules()
        if isinstance(module, nn.Linear)
    }
    units: list[Unit] = []
    for layers in zip(*reports, strict=True):
        by_name = [{linear.name.rpartition(".")[2]: linear for linear in layer.linears} for layer in layers]
        for fused in FUSED:
            names = [name for name in fused if name in by_name[0]]
            if names:
                full_names = tuple(by_name[0][name].name for name in names)
                units.append(Unit(full_names, _rungs(names, by_name, shapes)))
    return units


def _rungs(
    names: Sequence[str], walks: Sequence[Mapping[str, LinearReport]], shapes: Mapping[str, tuple[int, int]]
) -> tuple[Rung, ...]:
    """Of one unit. A walk that stores it as one before did is no rung of its own."""
    rungs: list[Rung] = []
    for place, linears in enumerate(walks):
        first = linears[names[0]]
        choice = LinearChoice(first.bits, first.group_size)
        if all(rung.choice != choice for rung in rungs):
            num_bytes = sum(packed_bytes(*shapes[name], linears[name].bits, linears[name].group_size) for name in names)
            rungs.append(Rung(choice, place, num_bytes, sum(linears[name].error for name in names)))
    return tuple(rungs)


def describe(units: Sequence[Unit], refinements: Sequence[Refinement]) -> str:
    """In words for the user: how many linears are stored how."""
    count_of_way: dict[str, int] = {}
    for unit, rung in zip(units, rungs_of(units, refinements), strict=True):
        if rung > 0:
            choice, plain = unit.rungs[rung].choice, unit.rungs[0].choice
            way = f"at {choice.bits} bits" if choice.bits != plain.bits else f"in groups of {choice.group_size}"
            count_of_way[way] = count_of_way.get(way, 0) + len(unit.names)
    ways = ", ".join(f"{count} {way}" for way, count in sorted(count_of_way.items())) or "none refined"
    return f"of {sum(len(unit.names) for unit in units)} linears {ways}"
