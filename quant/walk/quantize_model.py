"""The walk: every linear of one decoder layer after another quantised, each calibrated on what the quantised model
before it really computes.

One layer and the calibration activations are in memory at a time, but for those at its widest place, which wait in a
file. Knows a layer by its modules' names, not by its class; where layers come from and go to belongs to
`quant.walk.layer_walk`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from quant.errors import QuantizationError
from quant.int4_linear import QuantizedLinear
from quant.method.gptq import GptqOptions, HessianSum, choose_group_size, is_finite, quantize_matrix, relative_error
from quant.method.matrix import split_rows
from quant.options import LinearChoice
from quant.progress import ProgressSink
from quant.walk.carriers import carry_faster
from quant.walk.waiting import WaitingActivations, waiting_activations

QUANTIZE_STAGE = "quantize"
# Tokens in one forward of one layer. Larger batches leave the processor's caches and cost memory.
BATCH_TOKENS = 2048
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
FEED_FORWARD_INPUTS = ("gate_proj", "up_proj")

ChoiceOfLinear = Callable[[str], LinearChoice]


class LayeredModel(Protocol):
    """A decoder that is wholly in memory: `serving.model.transformer.Decoder` is one."""

    @property
    def layers(self) -> nn.ModuleList: ...
    def embed(self, ids: Tensor) -> Tensor: ...
    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class LinearReport:
    """`error`: squared error of the outputs over their squared norm. `damp`: the damping that the Hessian needed."""

    name: str
    bits: int
    group_size: int
    error: float
    damp: float


@dataclass(frozen=True, slots=True)
class LayerReport:
    index: int
    linears: tuple[LinearReport, ...]


def input_sizes(layers: Iterable[nn.Module]) -> list[int]:
    """The number of inputs of every linear that the walk quantises, each size once."""
    sizes = {module.in_features for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)}
    return sorted(sizes)


def fast_product_dtype() -> torch.dtype:
    """bf16 where the processor multiplies it in hardware, else float32."""
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported() if torch.backends.mkldnn.is_available() else False
    return torch.bfloat16 if supported else torch.float32


def quantize_layers(
    model: LayeredModel,
    calibration: Tensor,
    options: GptqOptions,
    progress: ProgressSink,
    *,
    choice_of: ChoiceOfLinear | None = None,
    dtype: torch.dtype | None = None,
) -> list[LayerReport]:
    """Replace each linear of each layer of a model in memory by a `QuantizedLinear`, in place.

    calibration: (samples, tokens) token ids
    choice_of:   by name such as `model.layers.0.mlp.down_proj`; what `options` say where absent
    dtype:       of activations and their products; bf16 where that is fast
    Raises QuantizationError if the group size does not divide every linear's inputs, or for values that are not finite.
    """
    layers = cast("Sequence[nn.Module]", model.layers)
    # Settled for the whole model here: left open, each matrix would choose its own.
    options = replace(options, group_size=choose_group_size(input_sizes(layers), options.group_size))
    with torch.inference_mode(), waiting_activations() as waiting:
        embedded = embed_in_batches(model.embed, calibration, dtype or fast_product_dtype())
        rotary = model.rotary(torch.arange(calibration.shape[1]))
        walk = CalibrationWalk(embedded, rotary, waiting, options, choice_of)
        reports: list[LayerReport] = []
        progress.update(QUANTIZE_STAGE, 0, len(layers))
        for index, layer in enumerate(layers):
            reports.append(walk.quantize_layer(index, layer))
            progress.update(QUANTIZE_STAGE, index + 1, len(layers))
    return reports


def embed_in_batches(embed: Callable[[Tensor], Tensor], calibration: Tensor, dtype: torch.dtype) -> Tensor:
    """(samples, tokens) ids -> (samples, tokens, hidden) in `dtype`."""
    embedded: Tensor | None = None
    step = _batch_samples(calibration.shape[1])
    for start in range(0, calibration.shape[0], step):
        batch = embed(calibration[start : start + step])
        # In place from the start: batches stacked at the end would leave as much memory again with the allocator.
        if embedded is None:
            embedded = torch.empty((*calibration.shape, batch.shape[-1]), dtype=dtype)
        embedded[start : start + step] = batch
    assert embedded is not None
    return embedded


def _batch_samples(tokens: int) -> int:
    return max(1, BATCH_TOKENS // tokens)


class CalibrationWalk:
    """The calibration activations at the entrance of the next layer, and how to carry them through it."""

    def __init__(
        self,
        embedded: Tensor,
        rotary: tuple[Tensor, Tensor],
        waiting: WaitingActivations,
        options: GptqOptions,
        choice_of: ChoiceOfLinear | None = None,
    ) -> None:
        """embedded: (samples, tokens, hidden), used up; its type is that of all activations. options: with their
        group size settled, for every linear that `choice_of` gives none."""
        self._hidden = embedded
        self._cos, self._sin = rotary
        self._options = options
        self._choice_of = choice_of
        self._waiting = waiting
        self._batch = _batch_samples(embedded.shape[1])

    def quantize_layer(self, index: int, layer: nn.Module) -> LayerReport:
        """In place, in the order in which a forward meets the linears; those that share an input share its Hessian."""
        prefix = f"model.layers.{index}"
        _require_finite_weights(prefix, layer)
        work = _LayerInWork(layer, self._hidden.dtype)
        reports: list[LinearReport] = []

        def settle(block: str, linears: Sequence[str], hessian: Tensor) -> None:
            plain = work.plain_linears(block, linears)
            made = self._quantize_linears(f"{prefix}.{block}", plain, hessian)
            for key, (linear, report) in made.items():
                work.replace(block, key, linear)
                reports.append(report)

        normed = [work.attention_input(hidden) for hidden in self._batches()]
        hessian = _hessian_of(normed)
        settle("self_attn", ATTENTION_INPUTS, hessian)
        if work.shares_norm:
            settle("mlp", work.feed_forward_inputs, hessian)
        del hessian

        mixed = [work.mix(normed.pop(0), self._cos, self._sin) for _ in self._batches()]
        settle("self_attn", ("o_proj",), _hessian_of(mixed))
        attended = (work.apply("self_attn", "o_proj", mixed.pop(0)) for _ in self._batches())
        if not work.is_parallel:
            self._add(attended)

        normed = [work.feed_forward_input(hidden) for hidden in self._batches()]
        if not work.shares_norm:
            settle("mlp", work.feed_forward_inputs, _hessian_of(normed))
        activated = (work.activate(normed.pop(0)) for _ in self._batches())
        settle("mlp", ("down_proj",), _hessian_of(self._waiting.keep(activated)))
        # Only now: the feed-forward of a parallel layer reads what attention reads.
        if work.is_parallel:
            self._add(attended)
        self._add(work.apply("mlp", "down_proj", inputs) for inputs in self._waiting.take())
        self._require_finite_activations(prefix)
        return LayerReport(index, tuple(reports))

    def pass_through(self, index: int, layer: nn.Module) -> None:
        """Carry the activations through a layer that is quantised already; its plain parameters change their type."""
        layer.to(self._hidden.dtype)
        carry_faster(layer)
        for hidden in self._batches():
            hidden.copy_(layer(hidden, self._cos, self._sin))
        self._require_finite_activations(f"model.layers.{index}")

    def hessian_after(self, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """Of what `norm` makes of the activations as they are now, for a head. (hidden, hidden) float32."""
        return _hessian_of(norm(hidden.to(torch.float32)).to(hidden.dtype) for hidden in self._batches())

    def _require_finite_activations(self, prefix: str) -> None:
        if not is_finite(self._hidden):
            raise QuantizationError(
                f"the activations that leave {prefix} are not finite (NaN or infinity); the source cannot be used so"
            )

    def _add(self, outputs: Iterable[Tensor]) -> None:
        """To the activations, batch by batch."""
        for hidden, output in zip(self._batches(), outputs, strict=True):
            hidden += output

    def _batches(self) -> Sequence[Tensor]:
        """Views of the activations: adding to one in place moves the walk on."""
        return self._hidden.split(self._batch)

    def _quantize_linears(
        self, prefix: str, linears: dict[str, nn.Linear], hessian: Tensor
    ) -> dict[str, tuple[QuantizedLinear, LinearReport]]:
        if not is_finite(hessian):
            names = "/".join(linears)
            raise QuantizationError(
                f"{prefix}.{names}: the calibration activations that go into it are not finite (NaN or infinity)"
            )
        made: dict[str, tuple[QuantizedLinear, LinearReport]] = {}
        for choice, keys in self._keys_of_choice(prefix, linears).items():
            try:
                made.update(self._quantize_together(prefix, {key: linears[key] for key in keys}, hessian, choice))
            except QuantizationError as error:
                raise QuantizationError(f"{prefix}.{'/'.join(keys)}: {error}") from error
        return {key: made[key] for key in linears}

    def _keys_of_choice(self, prefix: str, keys: Iterable[str]) -> dict[LinearChoice, list[str]]:
        keys_of_choice: dict[LinearChoice, list[str]] = {}
        for key in keys:
            choice = LinearChoice(self._options.bits)
            if self._choice_of is not None:
                choice = self._choice_of(f"{prefix}.{key}")
            if choice.group_size is None:
                choice = replace(choice, group_size=self._options.group_size)
            keys_of_choice.setdefault(choice, []).append(key)
        return keys_of_choice

    def _quantize_together(
        self, prefix: str, linears: dict[str, nn.Linear], hessian: Tensor, choice: LinearChoice
    ) -> dict[str, tuple[QuantizedLinear, LinearReport]]:
        """Rows do not influence each other, so linears of one input and one choice go through as one matrix."""
        sizes = [linear.out_features for linear in linears.values()]
        several = [linear.weight.detach() for linear in linears.values()]
        weights = torch.cat(several) if len(several) > 1 else several[0]
        options = replace(self._options, bits=choice.bits, group_size=choice.group_size)
        result = quantize_matrix(weights, hessian, options)
        made: dict[str, tuple[QuantizedLinear, LinearReport]] = {}
        parts = zip(linears.items(), result.errors.split(sizes, dim=1), split_rows(result.matrix, sizes), strict=True)
        for (key, linear), errors, matrix in parts:
            error = relative_error(errors)
            group_size = options.group_size or matrix.group_size  # -1 stays -1
            report = LinearReport(f"{prefix}.{key}", choice.bits, group_size, error, result.damp)
            made[key] = (QuantizedLinear(matrix, linear.bias), report)
        return made


class _LayerInWork:
    """A layer whose linears are being replaced, and a copy of it in the walk's type that carries the activations.

    The copy's linears are identities at first, so that a block returns what would go into the next of its linears.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        self._layer = layer
        self._copy = _copy_without_linears(layer).to(dtype)
        carry_faster(self._copy)
        own_norm = getattr(layer, "post_attention_layernorm", None)
        self.is_parallel = bool(getattr(layer, "is_parallel", own_norm is None))
        self.shares_norm = own_norm is None

    @property
    def feed_forward_inputs(self) -> list[str]:
        """The linears that read the feed-forward's input: without a gate there is one."""
        mlp = _child(self._layer, "mlp")
        return [name for name in FEED_FORWARD_INPUTS if getattr(mlp, name, None) is not None]

    def plain_linears(self, block: str, names: Sequence[str]) -> dict[str, nn.Linear]:
        owner = _child(self._layer, block)
        return {name: _linear(owner, name) for name in names}

    def replace(self, block: str, name: str, linear: QuantizedLinear) -> None:
        for layer in (self._layer, self._copy):
            setattr(_child(layer, block), name, linear)

    def attention_input(self, hidden: Tensor) -> Tensor:
        return _child(self._copy, "input_layernorm")(hidden)

    def feed_forward_input(self, hidden: Tensor) -> Tensor:
        norm = "input_layernorm" if self.shares_norm else "post_attention_layernorm"
        return _child(self._copy, norm)(hidden)

    def mix(self, normed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """What goes into o_proj, as long as that is an identity."""
        return _child(self._copy, "self_attn")(normed, cos, sin)

    def activate(self, normed: Tensor) -> Tensor:
        """What goes into down_proj, as long as that is an identity."""
        return _child(self._copy, "mlp")(normed)

    def apply(self, block: str, name: str, inputs: Tensor) -> Tensor:
        return _child(_child(self._copy, block), name)(inputs)


def _hessian_of(batches: Iterable[Tensor]) -> Tensor:
    """batches: (samples, tokens, inputs) each, at least one. Returns (inputs, inputs) float32."""
    total: HessianSum | None = None
    for inputs in batches:
        total = total or HessianSum(inputs.shape[-1])
        total.add(inputs)
    assert total is not None
    return total.mean()


def _require_finite_weights(prefix: str, layer: nn.Module) -> None:
    for name, parameter in layer.named_parameters():
        if not is_finite(parameter):
            raise QuantizationError(
                f"{prefix}.{name} holds values that are not finite (NaN or infinity); the source is damaged"
            )


def _copy_without_linears(layer: nn.Module) -> nn.Module:
    """A deep copy of the layer with an identity in place of each linear, whose weight is not copied."""
    stand_ins: dict[int, object] = {
        id(module): nn.Identity() for module in layer.modules() if isinstance(module, nn.Linear)
    }
    return copy.deepcopy(layer, stand_ins)


def _child(module: nn.Module, name: str) -> nn.Module:
    child = getattr(module, name, None)
    if not isinstance(child, nn.Module):
        raise QuantizationError(f"this kind of layer cannot be quantised: {type(module).__name__} has no {name}")
    return child


def _linear(module: nn.Module, name: str) -> nn.Linear:
    child = _child(module, name)
    if not isinstance(child, nn.Linear):
        raise QuantizationError(
            f"{name} is a {type(child).__name__}, not a plain linear; is the model quantised already?"
        )
    return child
