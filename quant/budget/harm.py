"""What each unit of a model does to its predictions when it alone is quantised: the order of a search for a budget.

The divergence from the source adds up nearly over units, and its mean is steady over few tokens, where a change of
perplexity is mostly chance. One pass over the layers: every unit has a copy of the hidden states from its layer on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.budget.order import Unit
from quant.method.matrix import QuantizedMatrix
from quant.progress import ProgressSink
from quant.report.measure import log_softmax_in_place
from quant.walk.layer_files import WorkDirectory
from quant.walk.layer_source import LayerSource

# Copies of the hidden states at a time. With HARM_TOKENS each they take as much as measuring the result does.
UNITS_OF_A_PASS = 192
HARM_WINDOWS = 2
HARM_TOKENS = 128
_STAGE = "Measuring what each linear contributes"


@dataclass(frozen=True, slots=True)
class _Fork:
    """The source with one unit quantised. unit: its index; states: (windows, tokens, hidden) float32."""

    unit: int
    states: Tensor


def measure_harm(
    source: LayerSource, base: WorkDirectory, units: Sequence[Unit], calibration: Tensor, progress: ProgressSink
) -> list[float]:
    """Mean KL(source || source with one unit as it is in `base`), nats per token, of each unit.

    calibration: (samples, tokens) ids, of which a few beginnings are used: held-out text stays unseen
    Units that cannot be refined are not measured and count as 0.
    """
    harm = [0.0] * len(units)
    chosen = [index for index, unit in enumerate(units) if len(unit.rungs) > 1]
    windows = calibration[:HARM_WINDOWS, :HARM_TOKENS]
    passes = range(0, len(chosen), UNITS_OF_A_PASS)
    with torch.inference_mode():
        for number, first in enumerate(passes):
            walk = _ForkedWalk(source, base, units, chosen[first : first + UNITS_OF_A_PASS], windows)
            for index in range(source.num_layers):
                progress.update(_STAGE, number * source.num_layers + index, len(passes) * source.num_layers)
                walk.advance(index)
            for unit, divergence in walk.divergences():
                harm[unit] = divergence
    progress.update(_STAGE, 1, 1)
    return harm


class _ForkedWalk:
    """The source's hidden states on their way through the layers; at its layer each chosen unit leaves with a copy."""

    def __init__(
        self, source: LayerSource, base: WorkDirectory, units: Sequence[Unit], chosen: Sequence[int], windows: Tensor
    ) -> None:
        """chosen: indices into `units`. windows: (count, tokens) ids."""
        self._source, self._base = source, base
        self._units, self._chosen = units, chosen
        self._plain = source.embed(windows)
        self._cos, self._sin = source.rotary(torch.arange(windows.shape[1]))
        self._forks: list[_Fork] = []

    def advance(self, index: int) -> None:
        """Through the next layer."""
        layer = self._source.layer(index).to(torch.float32)
        for fork in self._forks:
            fork.states.copy_(layer(fork.states, self._cos, self._sin))
        prefix = f"model.layers.{index}."
        here = [unit for unit in self._chosen if self._units[unit].names[0].startswith(prefix)]
        matrices = self._base.matrices(index) if here else {}
        for unit in here:
            quantized = {name.removeprefix(prefix): matrices[name] for name in self._units[unit].names}
            with _inserted(layer, quantized):
                self._forks.append(_Fork(unit, layer(self._plain, self._cos, self._sin)))
        self._plain = layer(self._plain, self._cos, self._sin)

    def divergences(self) -> Generator[tuple[int, float]]:
        """After the last layer: each chosen unit and its mean KL from the source."""
        expected = [log_softmax_in_place(logits) for logits in self._logits(self._plain)]
        chances = [log_probs.exp() for log_probs in expected]
        for fork in self._forks:
            total = 0.0
            for log_probs, chance, logits in zip(expected, chances, self._logits(fork.states), strict=True):
                difference = torch.sub(log_probs, log_softmax_in_place(logits), out=logits)
                total += float(difference.mul_(chance).sum())
            yield fork.unit, max(total / fork.states[..., 0].numel(), 0.0)

    def _logits(self, states: Tensor) -> Generator[Tensor]:
        """Of each window: (tokens, vocabulary) float32."""
        return (self._source.logits(rows) for rows in self._source.final_norm(states))


@contextlib.contextmanager
def _inserted(layer: nn.Module, matrices: Mapping[str, QuantizedMatrix]) -> Generator[None]:
    """The layer's linears of these names with the weights of `matrices`, for a while."""
    linears = {name: layer.get_submodule(name) for name in matrices}
    kept = {name: linear.weight for name, linear in linears.items()}
    for name, linear in linears.items():
        linear.weight = nn.Parameter(matrices[name].dequantize(), requires_grad=False)
    yield
    for name, linear in linears.items():
        linear.weight = kept[name]
