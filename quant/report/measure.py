"""What quantisation did to the predictions: perplexity, top-1 agreement and KL divergence on held-out windows.

Models are carried through layer by layer in float32, all windows at once and all models in one pass over the layers:
one layer's weights are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from quant.int4_linear import QuantizedLinear
from quant.method.gptq import GptqOptions, round_to_nearest
from quant.options import LinearChoice
from quant.progress import ProgressSink
from quant.walk.ends import round_ends, share_head
from quant.walk.layer_source import LayerSource

# Windows in one forward of one layer: more gain nothing and take memory.
BATCH_WINDOWS = 4
# Rows of logits that are compared at a time: of a large vocabulary, those of a whole window would be the peak.
COMPARED_ROWS = 128

RowLogits: TypeAlias = Callable[[int, slice], Tensor]
"""(window, rows of it) -> logits (rows, vocabulary) float32, for the caller to use up."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """One model against its source, over tokens: KL(source || model) in nats, its mean and its 99th percentile."""

    perplexity: float
    top1_agreement: float
    mean_kl: float
    kl_p99: float


class Ends(Protocol):
    """What is before and after the layers; methods as in `LayerSource`."""

    def embed(self, ids: Tensor) -> Tensor: ...
    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]: ...
    def final_norm(self, hidden: Tensor) -> Tensor: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


class PlainPath:
    """A model's float32 logits, window by window. Holds the hidden states of all windows, and no layer."""

    def __init__(self, ends: Ends, windows: Tensor) -> None:
        """windows: (count, tokens) ids."""
        self._ends = ends
        self._cos, self._sin = ends.rotary(torch.arange(windows.shape[1]))
        self._hidden = ends.embed(windows)
        self._is_finished = False

    def advance(self, layer: nn.Module) -> None:
        """Through the next layer, which computes in float32."""
        for batch in self._hidden.split(BATCH_WINDOWS):
            batch.copy_(layer(batch, self._cos, self._sin))

    def finish(self) -> None:
        """After the last layer."""
        self._hidden = self._ends.final_norm(self._hidden)
        self._is_finished = True

    def logits(self, window: int, rows: slice = slice(None)) -> Tensor:
        """(rows, vocabulary) float32."""
        assert self._is_finished
        with torch.inference_mode():
            return self._ends.logits(self._hidden[window, rows])


@dataclass(frozen=True, slots=True)
class PlainPaths:
    """Three models over the same windows; `nearest` is the source rounded to the result's grids without GPTQ."""

    source: PlainPath
    result: PlainPath
    nearest: PlainPath


def carry_paths(
    source: LayerSource,
    result: LayerSource,
    choices: Mapping[str, LinearChoice],
    options: GptqOptions,
    windows: Tensor,
    progress: ProgressSink,
    stage: str,
) -> PlainPaths:
    """One pass over the layers of source and result.

    choices: bits and group size of what is quantised in the result, by our decoder's names
    windows: (count, tokens) ids
    """
    with torch.inference_mode():
        rounded, ends = round_ends(source, choices, options), share_head(result, source)
        paths = PlainPaths(PlainPath(source, windows), PlainPath(ends, windows), PlainPath(rounded, windows))
        for index in range(source.num_layers):
            progress.update(stage, index, source.num_layers)
            layer = source.layer(index).to(torch.float32)
            paths.source.advance(layer)
            round_linears(layer, f"model.layers.{index}", choices, options)
            paths.nearest.advance(layer)
            del layer
            paths.result.advance(dequantized(result.layer(index)))
        for path in (paths.source, paths.result, paths.nearest):
            path.finish()
    progress.update(stage, source.num_layers, source.num_layers)
    return paths


def round_linears(layer: nn.Module, prefix: str, choices: Mapping[str, LinearChoice], options: GptqOptions) -> None:
    """Give the float32 linears of a layer the weights that rounding to the nearest code would leave, in place."""
    for name, module in layer.named_modules():
        choice = choices.get(f"{prefix}.{name}")
        if choice is not None:
            assert isinstance(module, nn.Linear)
            grid = replace(options, bits=choice.bits, group_size=choice.group_size)
            module.weight.copy_(round_to_nearest(module.weight, grid).dequantize())


def dequantized(layer: nn.Module) -> nn.Module:
    """The layer in float32 with plain linears: a `QuantizedLinear` dequantises its weight at every call."""
    for name, module in list(layer.named_modules()):
        if isinstance(module, QuantizedLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(module.matrix.dequantize(), requires_grad=False)
            linear.register_parameter("bias", module.bias)
            parent, _, attribute = name.rpartition(".")
            setattr(layer.get_submodule(parent), attribute, linear)
    return layer.to(torch.float32)


class AgreementSum:
    """Collects one model's windows against the source's."""

    def __init__(self) -> None:
        self._log_loss = 0.0
        self._kl: list[Tensor] = []  # (tokens,) each
        self._same = self._predicted = self._compared = 0

    def add(self, following: Tensor, source_log_probs: Tensor, logits: Tensor) -> None:
        """following: the token after each row, (rows,), or one fewer where the last row ends its window.
        source_log_probs and logits: (rows, vocabulary) float32; `logits` is used up."""
        log_probs = log_softmax_in_place(logits)
        self._log_loss += _log_loss(log_probs, following)
        self._predicted += following.shape[0]
        self._same += int((log_probs.argmax(1) == source_log_probs.argmax(1)).sum())
        self._compared += log_probs.shape[0]
        torch.sub(source_log_probs, log_probs, out=log_probs)
        self._kl.append((log_probs * source_log_probs.exp()).sum(1).clamp_min_(0))

    def result(self) -> Agreement:
        kl = torch.cat(self._kl).to(torch.float64)
        return Agreement(
            perplexity=math.exp(self._log_loss / self._predicted),
            top1_agreement=self._same / self._compared,
            mean_kl=float(kl.mean()),
            kl_p99=float(kl.sort().values[math.ceil(0.99 * kl.numel()) - 1]),
        )


def compare(
    windows: Tensor,
    source: RowLogits,
    others: Sequence[RowLogits],
    progress: ProgressSink,
    stage: str,
) -> tuple[float, list[Agreement]]:
    """The source's perplexity, and each other model's agreement with it. windows: (count, tokens) ids."""
    log_loss = 0.0
    sums = [AgreementSum() for _ in others]
    with torch.inference_mode():
        for index, ids in enumerate(windows):
            progress.update(stage, index, len(windows))
            for rows, following in _runs_of_rows(ids):
                log_probs = log_softmax_in_place(source(index, rows))
                log_loss += _log_loss(log_probs, following)
                for total, other in zip(sums, others, strict=True):
                    total.add(following, log_probs, other(index, rows))
    progress.update(stage, len(windows), len(windows))
    perplexity = math.exp(log_loss / (windows.shape[0] * (windows.shape[1] - 1)))
    return perplexity, [total.result() for total in sums]


def mean_log_loss(logits: RowLogits, windows: Tensor) -> float:
    """Negative log-likelihood, nats per token, of all tokens but each window's first. windows: (count, tokens) ids."""
    total = 0.0
    with torch.inference_mode():
        for index, ids in enumerate(windows):
            for rows, following in _runs_of_rows(ids):
                total += _log_loss(log_softmax_in_place(logits(index, rows)), following)
    return total / (windows.shape[0] * (windows.shape[1] - 1))


def _runs_of_rows(ids: Tensor) -> Generator[tuple[slice, Tensor]]:
    """Of one window: rows whose logits are made at a time, and the tokens that follow them, (rows,) or one fewer."""
    for start in range(0, len(ids), COMPARED_ROWS):
        end = start + COMPARED_ROWS
        yield slice(start, end), ids[start + 1 : end + 1]


def _log_loss(log_probs: Tensor, following: Tensor) -> float:
    """Summed over the rows that a token follows. log_probs: (rows, vocabulary)."""
    return -float(log_probs[: following.shape[0]].gather(1, following[:, None]).sum(dtype=torch.float64))


def log_softmax_in_place(logits: Tensor) -> Tensor:
    """Over the last dimension, without a second tensor of the vocabulary's width."""
    logits -= torch.logsumexp(logits, dim=-1, keepdim=True)
    return logits
