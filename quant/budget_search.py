"""The search for a perplexity budget, with real walks and measurements behind `quant.budget`.

Trials are cheap because each way of storing a linear is walked once for the whole model: a trial takes every linear
from one of those walks and carries a part of the held-out text through. The result itself is then walked anew.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quant.budget import (
    Rung,
    SearchResult,
    Unit,
    choices_of,
    measured_sensitivity,
    order_refinements,
    packed_bytes,
    search_budget,
)
from quant.layer_files import WorkDirectory
from quant.layer_source import LayerSource
from quant.layer_walk import insert_matrices, quantize_to_disk
from quant.measure import PlainPath, dequantized, log_softmax_in_place
from quant.options import LinearChoice, QuantizeOptions
from quant.progress import ProgressSink
from quant.quantize_model import LayerReport
from quant.report import BudgetTrial

# Windows of each held-out text that a trial measures. The result is measured on all of them.
TRIAL_WINDOWS = 8
SMALL_GROUP = 32
# Linears that the engine multiplies as one: of different widths they would lose their fast product.
FUSED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
_TRIAL_STAGE = "Trying a mixture"


@dataclass(frozen=True, slots=True)
class SearchRun:
    """What a search works on.

    calibration: (samples, tokens) ids; texts: (windows, tokens) ids of each held-out text
    options:     with their group size settled
    open_work:   the work directory of a walk with these options, locked while it is open
    """

    source: LayerSource
    calibration: Tensor
    texts: Sequence[Tensor]
    options: QuantizeOptions
    open_work: Callable[[QuantizeOptions], AbstractContextManager[WorkDirectory]]
    progress: ProgressSink


@dataclass(frozen=True, slots=True)
class FoundChoices:
    """`increase_percent` was measured on the plain path and a part of the text; `trials` in their order."""

    choices: Mapping[str, LinearChoice]
    increase_percent: float
    trials: tuple[BudgetTrial, ...]


class BudgetSearch:
    """Holds the walks of one source, and every increase that was measured with them, in percent."""

    def __init__(self, run: SearchRun, works: Sequence[WorkDirectory], units: Sequence[Unit]) -> None:
        self._run = run
        self._works = works
        self._units = units
        self._windows = [text[:TRIAL_WINDOWS] for text in run.texts]
        self._measured: dict[int, float] = {}
        self._source_loss = self._losses(lambda index: run.source.layer(index).to(torch.float32))
        self.base_increase = self._measured[0] = self._try_rungs({})
        self._order = order_refinements(units, self._sensitivity())

    def find(self, limit_percent: float) -> FoundChoices:
        """The smallest file that keeps the limit in trials. Raises BudgetUnreachableError if none does."""

        def try_choices(choices: Mapping[str, LinearChoice]) -> float:
            return self._try_rungs(self._rungs_of(choices))

        found = search_budget(self._units, self._order, limit_percent, try_choices, self._measured)
        self._remember(found)
        taken = self._order[: found.num_refined]
        return FoundChoices(choices_of(self._units, taken), found.increase_percent, found.trials)

    def _remember(self, found: SearchResult) -> None:
        """So that a search with another limit measures only what is new."""
        self._measured.update(found.measured)

    def _sensitivity(self) -> dict[str, float]:
        kinds = dict.fromkeys(unit.kind for unit in self._units)
        increases = {kind: self._try_rungs(self._best_of_kind(kind)) for kind in kinds}
        return measured_sensitivity(self._units, self.base_increase, increases)

    def _best_of_kind(self, kind: str) -> dict[str, int]:
        units = [unit for unit in self._units if unit.kind == kind]
        return self._rungs_of({name: unit.rungs[-1].choice for unit in units for name in unit.names})

    def _rungs_of(self, choices: Mapping[str, LinearChoice]) -> dict[str, int]:
        """Which walk each refined linear comes from."""
        rungs: dict[str, int] = {}
        for unit in self._units:
            if unit.names[0] in choices:
                wanted = choices[unit.names[0]]
                place = next(place for place, rung in enumerate(unit.rungs) if rung.choice == wanted)
                rungs.update(dict.fromkeys(unit.names, place))
        return rungs

    def _try_rungs(self, rungs: Mapping[str, int]) -> float:
        """rungs: the walk that a linear comes from, by name; the first one where absent. Percent over the source."""

        def mixed(index: int) -> nn.Module:
            layer, prefix = self._run.source.layer(index), f"model.layers.{index}"
            for place, work in enumerate(self._works):
                found = work.matrices(index)
                insert_matrices(layer, prefix, {name: m for name, m in found.items() if rungs.get(name, 0) == place})
            return dequantized(layer)

        losses = self._losses(mixed)
        return max(100 * (math.exp(loss - source) - 1) for loss, source in zip(losses, self._source_loss, strict=True))

    @torch.inference_mode()
    def _losses(self, layer_of: Callable[[int], nn.Module]) -> list[float]:
        """Mean negative log-likelihood of each text, in nats per token. layer_of: index -> layer in float32."""
        paths = [PlainPath(self._run.source, windows) for windows in self._windows]
        num_layers = self._run.source.num_layers
        for index in range(num_layers):
            self._run.progress.update(_TRIAL_STAGE, index, num_layers)
            layer = layer_of(index)
            for path in paths:
                path.advance(layer)
        for path in paths:
            path.finish()
        self._run.progress.update(_TRIAL_STAGE, num_layers, num_layers)
        return [_mean_loss(path, windows) for path, windows in zip(paths, self._windows, strict=True)]


@contextlib.contextmanager
def open_search(run: SearchRun) -> Generator[BudgetSearch]:
    """Walks the source once for each way of storing a linear; what a broken-off search has walked is taken over."""
    with contextlib.ExitStack() as stack:
        works: list[WorkDirectory] = []
        reports: list[list[LayerReport]] = []
        for options in rung_options(run.options, run.source.outline()):
            work = stack.enter_context(run.open_work(options))
            reports.append(
                quantize_to_disk(run.source, run.calibration, options.gptq, options.choice_of, work, run.progress)
            )
            works.append(work)
        yield BudgetSearch(run, works, units_of(reports, run.source.outline()))


def rung_options(options: QuantizeOptions, outline: nn.Module) -> list[QuantizeOptions]:
    """The options as they are, then with a smaller group everywhere, then with 8 bits everywhere.

    Only what differs from the one before; linears that have 8 bits already keep them.
    """
    group_size = options.gptq.group_size
    inputs = [module.in_features for module in outline.modules() if isinstance(module, nn.Linear)]
    found = [options]
    if group_size != SMALL_GROUP and all(size % SMALL_GROUP == 0 for size in inputs):
        found.append(replace(options, gptq=replace(options.gptq, group_size=SMALL_GROUP)))
    if options.gptq.bits < 8:
        found.append(replace(options, gptq=replace(options.gptq, bits=8)))
    return found


def units_of(reports: Sequence[Sequence[LayerReport]], outline: nn.Module) -> list[Unit]:
    """reports: of each walk, in the order of the rungs. outline: any layer, for the shapes."""
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
            rungs = tuple(
                Rung(
                    choice=LinearChoice(linears[names[0]].bits, linears[names[0]].group_size),
                    num_bytes=sum(
                        packed_bytes(*shapes[name], linears[name].bits, linears[name].group_size) for name in names
                    ),
                    error=sum(linears[name].error for name in names),
                )
                for linears in by_name
                if names
            )
            if names:
                units.append(Unit(tuple(by_name[0][name].name for name in names), "/".join(names), rungs))
    return units


def _mean_loss(path: PlainPath, windows: Tensor) -> float:
    total = 0.0
    for index, ids in enumerate(windows):
        log_probs = log_softmax_in_place(path.logits(index))
        total -= float(log_probs[:-1].gather(1, ids[1:, None]).sum(dtype=torch.float64))
    return total / (windows.shape[0] * (windows.shape[1] - 1))
