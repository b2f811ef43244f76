"""What quantisation did to the predictions: perplexity, top-1 agreement and KL divergence on held-out windows.

Models are carried through layer by layer in float32, all windows at once: one layer's weights are dequantised at a
time, so a model that only fits in its file's type can be measured too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from quant.progress import ProgressSink

# Windows in one forward of one layer.
BATCH_WINDOWS = 8

LayerTransform: TypeAlias = Callable[[int, nn.Module], nn.Module]
WindowLogits: TypeAlias = Callable[[Tensor], Tensor]
"""ids (tokens,) -> logits (tokens, vocabulary)."""


class MeasurableModel(Protocol):
    """`serving.model.transformer.Decoder` as seen from here. A layer is called with (hidden, cos, sin)."""

    @property
    def layers(self) -> nn.ModuleList: ...
    def embed(self, ids: Tensor) -> Tensor: ...
    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]: ...
    def final_norm(self, hidden: Tensor) -> Tensor: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Agreement:
    """One model against its source, over tokens: KL(source || model) in nats, its mean and its 99th percentile."""

    perplexity: float
    top1_agreement: float
    mean_kl: float
    kl_p99: float


class PlainPath:
    """A model's float32 logits, window by window. Holds the last hidden states of all windows, not its layers."""

    def __init__(
        self,
        model: MeasurableModel,
        windows: Tensor,
        progress: ProgressSink,
        stage: str,
        *,
        transform: LayerTransform | None = None,
    ) -> None:
        """windows: (count, tokens) ids. transform: may exchange a layer's copy for another before it is used."""
        layers: Sequence[nn.Module] = list(model.layers)
        self._ends = _float32_without_layers(model)
        cos, sin = self._ends.rotary(torch.arange(windows.shape[1]))
        with torch.inference_mode():
            hidden = self._ends.embed(windows)
            for index, layer in enumerate(layers):
                progress.update(stage, index, len(layers))
                copied = copy.deepcopy(layer).to(torch.float32)
                exact = copied if transform is None else transform(index, copied)
                for batch in hidden.split(BATCH_WINDOWS):
                    batch.copy_(exact(batch, cos, sin))
            self._hidden = self._ends.final_norm(hidden)
        progress.update(stage, len(layers), len(layers))

    def logits(self, window: int) -> Tensor:
        """(tokens, vocabulary) float32."""
        with torch.inference_mode():
            return self._ends.logits(self._hidden[window])


class AgreementSum:
    """Collects one model's windows against the source's."""

    def __init__(self) -> None:
        self._log_loss = 0.0
        self._kl: list[Tensor] = []  # (tokens,) each
        self._same = self._predicted = self._compared = 0

    def add(self, ids: Tensor, source_log_probs: Tensor, logits: Tensor) -> None:
        """ids (tokens,); source_log_probs and logits (tokens, vocabulary) float32. `logits` is used up."""
        log_probs = log_softmax_in_place(logits)
        self._log_loss -= float(log_probs[:-1].gather(1, ids[1:, None]).sum(dtype=torch.float64))
        self._predicted += ids.shape[0] - 1
        self._same += int((log_probs.argmax(1) == source_log_probs.argmax(1)).sum())
        self._compared += ids.shape[0]
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
    source: Callable[[int], Tensor],
    others: Sequence[Callable[[int], Tensor]],
    progress: ProgressSink,
    stage: str,
) -> tuple[float, list[Agreement]]:
    """The source's perplexity, and each other model's agreement with it. Callables: window index -> logits."""
    log_loss = 0.0
    sums = [AgreementSum() for _ in others]
    with torch.inference_mode():
        for index, ids in enumerate(windows):
            progress.update(stage, index, len(windows))
            log_probs = log_softmax_in_place(source(index).to(torch.float32))
            log_loss -= float(log_probs[:-1].gather(1, ids[1:, None]).sum(dtype=torch.float64))
            for total, other in zip(sums, others, strict=True):
                total.add(ids, log_probs, other(index).to(torch.float32))
    progress.update(stage, len(windows), len(windows))
    perplexity = math.exp(log_loss / (windows.shape[0] * (windows.shape[1] - 1)))
    return perplexity, [total.result() for total in sums]


def log_softmax_in_place(logits: Tensor) -> Tensor:
    """Over the last dimension, without a second tensor of the vocabulary's width."""
    logits -= torch.logsumexp(logits, dim=-1, keepdim=True)
    return logits


def _float32_without_layers(model: MeasurableModel) -> MeasurableModel:
    """A float32 copy of embeddings, final norm and head."""
    assert isinstance(model, nn.Module)
    copied = copy.deepcopy(model, {id(model.layers): nn.ModuleList()})
    return copied.to(torch.float32)
