"""The walk: every linear of every decoder layer quantised in place, each calibrated on what the quantised model before
it really computes.

One layer's activations are in memory at a time. Knows a layer by the protocols below, not by its class; loading,
writing and reporting belong to `quant.quantize_directory`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from quant.errors import QuantizationError
from quant.gptq import GptqOptions, HessianSum, choose_group_size, output_error, quantize_matrix
from quant.int4_linear import QuantizedLinear
from quant.matrix import split_rows
from quant.progress import ProgressSink

QUANTIZE_STAGE = "quantize"
# Tokens in one forward of one layer. Larger batches gain nothing on a CPU and cost memory.
BATCH_TOKENS = 4096
# Below this many outputs a matrix step is too small to share between threads: waiting for them costs more.
MIN_OUTPUTS_FOR_THREADS = 4096
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
FEED_FORWARD_INPUTS = ("gate_proj", "up_proj")


class LayeredModel(Protocol):
    """What the walk needs of a decoder: `serving.model.transformer.Decoder` has it.

    Each layer has input_layernorm, self_attn (q_proj, k_proj, v_proj, o_proj), post_attention_layernorm and mlp
    (gate_proj, up_proj, down_proj), and adds attention, then feed-forward, to its input. In a parallel block
    post_attention_layernorm is None: feed-forward reads the same normed input as attention.
    """

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


def input_sizes(model: LayeredModel) -> list[int]:
    """The number of inputs of every linear that the walk quantises, each size once."""
    sizes = {
        module.in_features for layer in model.layers for module in layer.modules() if isinstance(module, nn.Linear)
    }
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
    bits_of_linear: Callable[[str], int] | None = None,
    dtype: torch.dtype | None = None,
) -> list[LayerReport]:
    """Replace each linear of each layer by a `QuantizedLinear`, in place.

    calibration:    (samples, tokens) token ids
    bits_of_linear: by name such as `model.layers.0.mlp.down_proj`; options.bits where absent
    dtype:          of activations and their products; bf16 where that is fast
    Raises QuantizationError if the group size does not divide every linear's inputs.
    """
    # Settled for the whole model here: left open, each matrix would choose its own.
    options = replace(options, group_size=choose_group_size(input_sizes(model), options.group_size))
    layers = cast("Sequence[nn.Module]", model.layers)
    with torch.inference_mode():
        walk = _Walk(model, calibration, options, bits_of_linear, dtype or fast_product_dtype())
        reports: list[LayerReport] = []
        progress.update(QUANTIZE_STAGE, 0, len(layers))
        for index, layer in enumerate(layers):
            reports.append(LayerReport(index, tuple(walk.quantize_layer(index, layer))))
            progress.update(QUANTIZE_STAGE, index + 1, len(layers))
    return reports


class _Walk:
    """The calibration activations at the entrance of the next layer, and how to carry them through it."""

    def __init__(
        self,
        model: LayeredModel,
        calibration: Tensor,
        options: GptqOptions,
        bits_of_linear: Callable[[str], int] | None,
        dtype: torch.dtype,
    ) -> None:
        samples, tokens = calibration.shape
        self._options = options
        self._bits_of_linear = bits_of_linear
        self._dtype = dtype
        self._batch = max(1, BATCH_TOKENS // tokens)
        self._cos, self._sin = model.rotary(torch.arange(tokens))
        self._hidden = torch.cat([model.embed(ids).to(dtype) for ids in calibration.split(self._batch)])
        assert self._hidden.shape[:2] == (samples, tokens)

    def quantize_layer(self, index: int, layer: nn.Module) -> list[LinearReport]:
        """In the order in which a forward meets the linears; those that share an input share its Hessian."""
        work = _LayerInWork(layer, self._dtype)
        reports: list[LinearReport] = []

        def settle(block: str, linears: Sequence[str], hessian: HessianSum) -> None:
            plain = work.plain_linears(block, linears)
            made = self._quantize_linears(f"model.layers.{index}.{block}", plain, hessian)
            for key, (linear, report) in made.items():
                work.replace(block, key, linear)
                reports.append(report)

        hessian = _hessian_of(map(work.attention_input, self._batches()))
        settle("self_attn", ATTENTION_INPUTS, hessian)
        if work.is_parallel:
            settle("mlp", FEED_FORWARD_INPUTS, hessian)

        mixed = [work.mix(hidden, self._cos, self._sin) for hidden in self._batches()]
        settle("self_attn", ("o_proj",), _hessian_of(mixed))
        attended = [work.apply("self_attn", "o_proj", mixed.pop(0)) for _ in self._batches()]

        if not work.is_parallel:
            self._add(attended)
            settle("mlp", FEED_FORWARD_INPUTS, _hessian_of(map(work.feed_forward_input, self._batches())))

        inner = [work.activate(hidden) for hidden in self._batches()]
        settle("mlp", ("down_proj",), _hessian_of(inner))
        if work.is_parallel:
            self._add(attended)
        self._add([work.apply("mlp", "down_proj", inner.pop(0)) for _ in self._batches()])
        return reports

    def _add(self, outputs: list[Tensor]) -> None:
        """To the activations, batch by batch; `outputs` is used up."""
        for hidden in self._batches():
            hidden += outputs.pop(0)

    def _batches(self) -> Sequence[Tensor]:
        """Views of the activations: adding to one in place moves the walk on."""
        return self._hidden.split(self._batch)

    def _quantize_linears(
        self, prefix: str, linears: dict[str, nn.Linear], hessian: HessianSum
    ) -> dict[str, tuple[QuantizedLinear, LinearReport]]:
        mean = hessian.mean()
        made: dict[str, tuple[QuantizedLinear, LinearReport]] = {}
        names_of_bits: dict[int, list[str]] = {}
        for key in linears:
            bits = self._options.bits if self._bits_of_linear is None else self._bits_of_linear(f"{prefix}.{key}")
            names_of_bits.setdefault(bits, []).append(key)
        for bits, keys in names_of_bits.items():
            # Rows do not influence each other, so linears of one input and one width go through as one matrix.
            weights = [linears[key].weight.detach().to(torch.float32) for key in keys]
            options = replace(self._options, bits=bits)
            try:
                with _fitting_threads(sum(weight.shape[0] for weight in weights)):
                    result = quantize_matrix(torch.cat(weights), mean, options)
            except QuantizationError as error:
                raise QuantizationError(f"{prefix}.{'/'.join(keys)}: {error}") from error
            matrices = split_rows(result.matrix, [weight.shape[0] for weight in weights])
            for key, weight, matrix in zip(keys, weights, matrices, strict=True):
                error = output_error(weight, matrix, mean)
                group_size = options.group_size or matrix.group_size  # -1 stays -1
                report = LinearReport(f"{prefix}.{key}", bits, group_size, error, result.damp)
                made[key] = (QuantizedLinear(matrix, linears[key].bias), report)
        return {key: made[key] for key in linears}


class _LayerInWork:
    """A layer whose linears are being replaced, and a copy of it in the walk's type that carries the activations.

    The copy's linears are identities at first, so that a block returns what would go into the next of its linears.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        self._layer = layer
        self._copy = _copy_without_linears(layer).to(dtype)
        self.is_parallel = getattr(layer, "post_attention_layernorm", None) is None

    def plain_linears(self, block: str, names: Sequence[str]) -> dict[str, nn.Linear]:
        owner = _child(self._layer, block)
        return {name: _linear(owner, name) for name in names}

    def replace(self, block: str, name: str, linear: QuantizedLinear) -> None:
        for layer in (self._layer, self._copy):
            setattr(_child(layer, block), name, linear)

    def attention_input(self, hidden: Tensor) -> Tensor:
        return _child(self._copy, "input_layernorm")(hidden)

    def feed_forward_input(self, hidden: Tensor) -> Tensor:
        norm = "input_layernorm" if self.is_parallel else "post_attention_layernorm"
        return _child(self._copy, norm)(hidden)

    def mix(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """What goes into o_proj, as long as that is an identity."""
        return _child(self._copy, "self_attn")(self.attention_input(hidden), cos, sin)

    def activate(self, hidden: Tensor) -> Tensor:
        """What goes into down_proj, as long as that is an identity."""
        return _child(self._copy, "mlp")(self.feed_forward_input(hidden))

    def apply(self, block: str, name: str, inputs: Tensor) -> Tensor:
        return _child(_child(self._copy, block), name)(inputs)


def _hessian_of(batches: Iterable[Tensor]) -> HessianSum:
    """batches: (samples, tokens, inputs) each, at least one."""
    total: HessianSum | None = None
    for inputs in batches:
        total = total or HessianSum(inputs.shape[-1])
        total.add(inputs)
    assert total is not None
    return total


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


@contextlib.contextmanager
def _fitting_threads(out_features: int) -> Generator[None]:
    before = torch.get_num_threads()
    if out_features >= MIN_OUTPUTS_FOR_THREADS or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
