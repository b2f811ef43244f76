"""From a decoder as it lies on disk to what the engine multiplies by: fused projections, packed weights, one dtype.

Names on disk and in training stay Hugging Face's; fusing q/k/v and gate/up and laying weights out for a kernel happen
here and nowhere else. `exact=True` prepares the plain path: dequantised fp32 weights, nothing rounded. `prepare_live`
copies weights in training, for roll-outs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from quant.bitsandbytes_linear import LoadIn, announce_bitsandbytes, build_bitsandbytes_kernel, load_in_of
from quant.errors import CheckpointError
from quant.int4_linear import (
    INT4PACK_GROUP_SIZES,
    INT4PACK_ROW_MULTIPLE,
    KernelName,
    LinearKernel,
    QuantizedLinear,
    SplitInt4PackKernel,
    build_kernel,
    probe_kernel,
)
from quant.method.gptq import GptqOptions, round_to_nearest
from quant.method.matrix import concat_rows, have_equal_groups
from quant.native.large_pages import LargePages
from quant.native.linear import BLOCK_OUTPUTS, GROUP_MULTIPLE, NativeLinear
from serving.engine.native_step import NativeStep, build_native_step, why_no_native_step
from serving.engine.norms import PreparedNorm, prepare_norm
from serving.model.attention import ROTARY_FORMS, RotaryForm, alibi_slopes, rotary_frequencies, rotary_tables
from serving.model.spec import DecoderSpec, Positions
from serving.model.transformer import ACTIVATIONS, ActivationForm, Decoder, DecoderLayer

logger = logging.getLogger(__name__)

# Up to this many rows the head is read in 8 bits (memory-bound); above, the bf16 product is faster (compute-bound).
INT8_HEAD_MAX_ROWS = 4
HEAD_BLOCK_ROWS = 4096


@dataclass(frozen=True, slots=True)
class FusedLinear:
    """One product for all projections that read the same input."""

    kernel: LinearKernel
    parts: tuple[tuple[str, int], ...]  # (Hugging Face module name, width) in order of output columns


@dataclass(frozen=True, slots=True)
class PreparedLayer:
    """`post_attention_norm` is None where attention and feed-forward read one normed input."""

    input_norm: PreparedNorm
    post_attention_norm: PreparedNorm | None
    q_norm: PreparedNorm | None
    k_norm: PreparedNorm | None
    qkv: FusedLinear
    out: FusedLinear
    gate_up: FusedLinear  # the second projection alone where the activation has no gate
    down: FusedLinear
    is_parallel: bool  # feed-forward reads the layer's input, not attention's result


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """Everything a step reads. `dtype` is that of activations between kernels and of the KV cache."""

    spec: DecoderSpec
    layers: Sequence[PreparedLayer]
    embedding: Tensor  # (vocabulary, hidden) in dtype
    embedding_norm: PreparedNorm | None
    activation: ActivationForm
    final_norm: PreparedNorm
    head: Callable[[Tensor], Tensor]  # (rows, hidden) in dtype -> logits (rows, vocabulary) float32
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]]  # positions (tokens,) -> cos, signed sin (tokens, turned) fp32
    rotary_form: RotaryForm
    alibi_slopes: Tensor | None  # (kv heads, query heads of each) float32, where distance lowers the scores
    dtype: torch.dtype
    is_exact: bool
    kernel_name: KernelName
    native: NativeStep | None = None  # the whole step in one call, where the model's form has one

    def weight_bytes(self) -> int | None:
        """Of the linears and the head, which a decoded token reads once; None where not all are native."""
        linears = (linear for layer in self.layers for linear in (layer.qkv, layer.out, layer.gate_up, layer.down))
        readers = [*(linear.kernel for linear in linears), self.head]
        counted = [reader.num_bytes for reader in readers if isinstance(reader, NativeLinear | NativeHead)]
        return sum(counted) if len(counted) == len(readers) else None

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of every linear of the layers, by its Hugging Face name."""
        fused = (part for layer in self.layers for part in (layer.qkv, layer.out, layer.gate_up, layer.down))
        return {name: (width, linear.kernel.in_features) for linear in fused for name, width in linear.parts}


def prepare(decoder: Decoder, *, exact: bool, native: bool = True, load_in: LoadIn | None = None) -> PreparedModel:
    """Prepare a decoder for inference. Its tensors are not changed; embeddings and head may be shared.

    native:  whether activations may be rounded to int8 for the native kernels, where the machine has them
    load_in: round the plain linears of the layers with bitsandbytes. CheckpointError where one is quantised already
    """
    if load_in is not None:
        _refuse_quantized(decoder, load_in)
        announce_bitsandbytes(load_in)
        return _prepare(decoder, load_in.kernel_name, torch.bfloat16, is_exact=False)
    if exact:
        return _prepare(decoder, KernelName.PLAIN, torch.float32, is_exact=True)
    return _prepare(decoder, probe_kernel(rounds_activations=native), torch.bfloat16, is_exact=False)


def prepare_live(decoder: Decoder, dtype: torch.dtype) -> PreparedModel:
    """A copy of a model in training, for roll-outs: plain products in `dtype`, sequences in one batch, nothing packed.

    The copy is whole: an optimizer step afterwards changes nothing in it.
    """
    return _prepare(decoder, KernelName.PLAIN, dtype, is_exact=False, copies=True)


def _prepare(
    decoder: Decoder, kernel_name: KernelName, dtype: torch.dtype, *, is_exact: bool, copies: bool = False
) -> PreparedModel:
    spec = decoder.spec
    rotary_form = ROTARY_FORMS[spec.positions]
    with torch.inference_mode():
        embedding = decoder.model.embed_tokens.weight.detach().to(dtype, copy=copies)
        if decoder.lm_head is None:
            head_weight = embedding
        else:
            head_weight = _plain_weight(decoder.lm_head, dtype).to(dtype, copy=copies)
        embedding_norm = decoder.model.embed_norm
        memory = LargePages()
        layers = [
            _prepare_layer(spec, index, layer, kernel_name, dtype, memory)
            for index, layer in enumerate(decoder.iterate_layers())
        ]
        return PreparedModel(
            spec=spec,
            layers=layers,
            embedding=embedding,
            embedding_norm=None if embedding_norm is None else prepare_norm(embedding_norm, spec),
            activation=ACTIVATIONS[spec.activation],
            final_norm=prepare_norm(decoder.model.norm, spec),
            head=_prepare_head(head_weight, spec.logit_scale, kernel_name, is_exact=is_exact),
            rotary=partial(rotary_tables, rotary_form, rotary_frequencies(spec, torch.device("cpu"))),
            rotary_form=rotary_form,
            alibi_slopes=_ALIBI_SLOPES[spec.positions](spec),
            dtype=dtype,
            is_exact=is_exact,
            kernel_name=kernel_name,
            native=build_native_step(decoder, layers, embedding) if kernel_name is KernelName.NATIVE else None,
        )


def prepare_one_layer(ends: PreparedModel, decoder: Decoder, index: int) -> PreparedModel:
    """`ends` with one layer in memory: its twin is what `prepare` makes of the whole decoder.

    ends:    what `prepare` made of this decoder while it had no layers
    decoder: now with the layer `index` of its model, and no other
    Its native step is None where `ends` has none, or where this layer has no native form.
    """
    (layer,) = decoder.iterate_layers()
    with torch.inference_mode():
        prepared = [_prepare_layer(ends.spec, index, layer, ends.kernel_name, ends.dtype, LargePages())]
        is_native = ends.native is not None and why_no_native_step(ends.spec, prepared) is None
        native = NativeStep(decoder, prepared, ends.embedding) if is_native else None
    return replace(ends, layers=prepared, native=native)


def _prepare_layer(
    spec: DecoderSpec, index: int, layer: DecoderLayer, kernel_name: KernelName, dtype: torch.dtype, memory: LargePages
) -> PreparedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    after_attention = layer.post_attention_layernorm

    def fuse(block: str, *names: str) -> FusedLinear:
        owner = attention if block == "self_attn" else mlp
        linears = [getattr(owner, name) for name in names]
        prefix = f"model.layers.{index}.{block}"
        parts = tuple((f"{prefix}.{name}", linear.out_features) for name, linear in zip(names, linears, strict=True))
        return FusedLinear(_fuse(linears, kernel_name, dtype, memory), parts)

    return PreparedLayer(
        input_norm=prepare_norm(layer.input_layernorm, spec),
        post_attention_norm=None if after_attention is None else prepare_norm(after_attention, spec),
        q_norm=None if attention.q_norm is None else prepare_norm(attention.q_norm, spec),
        k_norm=None if attention.k_norm is None else prepare_norm(attention.k_norm, spec),
        qkv=fuse("self_attn", "q_proj", "k_proj", "v_proj"),
        out=fuse("self_attn", "o_proj"),
        gate_up=fuse("mlp", *(("up_proj",) if mlp.gate_proj is None else ("gate_proj", "up_proj"))),
        down=fuse("mlp", "down_proj"),
        is_parallel=layer.is_parallel,
    )


def _no_slopes(spec: DecoderSpec) -> None:
    return None


def _slopes_of_shared_heads(spec: DecoderSpec) -> Tensor:
    return alibi_slopes(spec.num_heads).view(spec.num_kv_heads, -1)


_ALIBI_SLOPES: Mapping[Positions, Callable[[DecoderSpec], Tensor | None]] = {
    Positions.ROTARY_HALVES: _no_slopes,
    Positions.ROTARY_INTERLEAVED: _no_slopes,
    Positions.ALIBI: _slopes_of_shared_heads,
}


def _fuse(
    linears: Sequence[nn.Module], kernel_name: KernelName, dtype: torch.dtype, memory: LargePages
) -> LinearKernel:
    bias = _stack_bias(linears)
    matrices = [linear.matrix for linear in linears if isinstance(linear, QuantizedLinear)]
    if len(matrices) == len(linears) and have_equal_groups(matrices):
        return build_kernel(concat_rows(matrices), bias, kernel_name, plain_dtype=dtype, memory=memory)
    weights = [_plain_weight(linear, dtype) for linear in linears]
    if (load_in := load_in_of(kernel_name)) is not None:
        return build_bitsandbytes_kernel(torch.cat(weights), bias, load_in)
    return DenseKernel(torch.cat(weights), None if bias is None else bias.to(dtype))


def _refuse_quantized(decoder: Decoder, load_in: LoadIn) -> None:
    if any(isinstance(module, QuantizedLinear) for module in decoder.modules()):
        raise CheckpointError(
            f"the model is quantised already, and load_in = {load_in.value} rounds plain weights; "
            "leave load_in out, or give the directory of the source weights"
        )


def _plain_weight(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    if isinstance(linear, QuantizedLinear):
        return linear.matrix.dequantize(dtype)
    assert isinstance(linear, nn.Linear)
    return linear.weight.detach().to(dtype)


def _stack_bias(linears: Sequence[nn.Module]) -> Tensor | None:
    """All biases or none: the linears of one fused product come from one family."""
    biases = [bias for bias in (cast("Tensor | None", linear.bias) for linear in linears) if bias is not None]
    if not biases:
        return None
    if len(biases) != len(linears):
        raise CheckpointError(f"{len(biases)} of {len(linears)} fused projections have a bias; expected all or none")
    return torch.cat([bias.detach().to(torch.float32) for bias in biases])


class DenseKernel:
    """A linear that is not quantised, in the engine's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._weight, self._bias)


def _prepare_head(
    weight: Tensor, logit_scale: float, kernel_name: KernelName, *, is_exact: bool
) -> Callable[[Tensor], Tensor]:
    head = DenseKernel(weight, None) if is_exact else _fast_head(weight, kernel_name)
    return head if logit_scale == 1.0 else ScaledHead(head, logit_scale)


def _fast_head(weight: Tensor, kernel_name: KernelName) -> Callable[[Tensor], Tensor]:
    if kernel_name is KernelName.NATIVE and not weight.shape[1] % GROUP_MULTIPLE:
        # The smallest group: 3 % more bytes to read than with 64, half of what int8 activations cost in perplexity.
        return NativeHead(weight, GROUP_MULTIPLE)
    return FastHead(weight, _head_group_size(weight, kernel_name))


class ScaledHead:
    """A head whose logits are multiplied by a constant, in float32."""

    def __init__(self, head: Callable[[Tensor], Tensor], scale: float) -> None:
        self._head = head
        self._scale = scale

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._head(hidden).mul_(self._scale)


class FastHead:
    """Logits of few rows from 8-bit weights, of many rows from the plain ones, which the embedding keeps anyway.

    `group_size` None: always from the plain ones.
    """

    def __init__(self, weight: Tensor, group_size: int | None) -> None:
        self._weight = weight
        # In blocks: packing takes four bytes a code, and a float32 copy of the whole head would be the process's peak.
        self._blocks = (
            [] if group_size is None else [_pack_head_block(b, group_size) for b in weight.split(HEAD_BLOCK_ROWS)]
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        if hidden.shape[0] > INT8_HEAD_MAX_ROWS or not self._blocks:
            return nn.functional.linear(hidden, self._weight).to(torch.float32)
        return torch.cat([block(hidden) for block in self._blocks], dim=1).to(torch.float32)


class NativeHead:
    """Logits from 8-bit weights; those of a row do not depend on how many rows there are."""

    def __init__(self, weight: Tensor, group_size: int) -> None:
        options = GptqOptions(bits=8, group_size=group_size, range_search=False)
        # In blocks: a float32 copy of the whole head would be the process's peak.
        self._vocab_size = weight.shape[0]
        missing = -self._vocab_size % BLOCK_OUTPUTS
        padded = nn.functional.pad(weight, (0, 0, 0, missing)) if missing else weight
        blocks = [round_to_nearest(block, options) for block in padded.split(HEAD_BLOCK_ROWS)]
        self._kernel = NativeLinear(concat_rows(blocks), None)

    @property
    def num_bytes(self) -> int:
        """Of the weights, as a product reads them."""
        return self._kernel.num_bytes

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._kernel.to_float32(hidden)[:, : self._vocab_size]


def _pack_head_block(weight: Tensor, group_size: int) -> LinearKernel:
    options = GptqOptions(bits=8, group_size=group_size, range_search=False)
    return SplitInt4PackKernel(round_to_nearest(weight, options), None, for_many_rows=False)


def _head_group_size(weight: Tensor, kernel_name: KernelName) -> int | None:
    """The largest group that the packed product takes for this head; None where it takes none."""
    if kernel_name is not KernelName.TORCH_INT4PACK or weight.shape[0] % INT4PACK_ROW_MULTIPLE:
        return None
    return max((size for size in INT4PACK_GROUP_SIZES if weight.shape[1] % size == 0), default=None)
