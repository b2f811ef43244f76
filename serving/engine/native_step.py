"""The step of a Llama-like model as one native call: the fast twin of `runner.run_step`.

It reads the same prepared weights and the same cache. Whether a model has one is decided once, at preparation, and
logged. A row is computed by the same operations whatever else is in its step: alone or in a batch, in a prompt's chunk
of any height, after a prefix that was found, as a checked guess. So whether a chunk goes through it may depend on that
chunk only, never on its neighbours.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant.native.library import load_library
from quant.native.linear import NativeLinear
from quant.native.packing import CMatrix
from serving.engine.kv_blocks import BLOCK_SIZE, KVCache
from serving.engine.scheduler import Chunk
from serving.model.attention import rotary_frequencies
from serving.model.spec import Activation, BlockForm, DecoderSpec, Norm, Positions
from serving.model.transformer import Decoder, DecoderLayer

if TYPE_CHECKING:
    from serving.engine.prepare import PreparedLayer

logger = logging.getLogger(__name__)

_HEAD_DIM_MULTIPLE = 32
_MAX_HEAD_DIM = 256
_WIDTH_MULTIPLE = 16
_ONE_FORM = (Norm.RMS, BlockForm.SEQUENTIAL, Positions.ROTARY_HALVES, Activation.SWIGLU)


class _CLayer(ctypes.Structure):
    """`Layer` of decode_step.c."""

    _fields_ = (
        ("input_norm", ctypes.c_void_p),
        ("post_attention_norm", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("qkv", CMatrix),
        ("out", CMatrix),
        ("gate_up", CMatrix),
        ("down", CMatrix),
    )


class _CModel(ctypes.Structure):
    """`Model` of decode_step.c."""

    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("embedding", ctypes.c_void_p),
        ("final_norm", ctypes.c_void_p),
        ("frequencies", ctypes.c_void_p),
        ("num_layers", ctypes.c_int32),
        ("hidden", ctypes.c_int32),
        ("inner", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("norm_eps", ctypes.c_float),
    )


class _CBatch(ctypes.Structure):
    """`Batch` of decode_step.c."""

    _fields_ = (
        ("cache", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("layer_stride", ctypes.c_int64),
        ("scales_layer_stride", ctypes.c_int64),
        ("ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("sequences", ctypes.c_void_p),
        ("num_rows", ctypes.c_int32),
        ("table_width", ctypes.c_int32),
        ("hidden", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    )


class NativeStep:
    """Holds what the native code points to; the weights belong to `layers`."""

    def __init__(self, decoder: Decoder, layers: Sequence[PreparedLayer], embedding: Tensor) -> None:
        """Raises ValueError with the reason if the model's form has no native step."""
        reason = why_no_native_step(decoder.spec, layers)
        library = load_library()
        if reason is not None or library is None:
            raise ValueError(reason or "the native kernels are not available")
        assert embedding.dtype == torch.bfloat16
        assert embedding.is_contiguous()
        self._call = library.causerie_decode_step
        self._hidden_size = decoder.spec.hidden_size
        frequencies = rotary_frequencies(decoder.spec)
        self._kept: list[Tensor | ctypes.Array[_CLayer]] = [embedding, frequencies]
        c_layers = (_CLayer * len(layers))(
            *(self._layer(source, layer) for source, layer in zip(decoder.iterate_layers(), layers, strict=True))
        )
        self._kept.append(c_layers)
        spec = decoder.spec
        self._model = _CModel(
            ctypes.addressof(c_layers),
            embedding.data_ptr(),
            self._norm(decoder.model.norm),
            frequencies.data_ptr(),
            len(layers),
            spec.hidden_size,
            spec.intermediate_size,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            BLOCK_SIZE,
            spec.norm_eps,
        )

    def takes(self, chunk: Chunk) -> bool:
        """Whether `run` computes this chunk. Rows with an adapter go through the single products."""
        return chunk.sequence.adapter is None

    def run(self, cache: KVCache, chunks: Sequence[Chunk]) -> Tensor:
        """As `runner.run_step`: (rows, hidden) bfloat16 after the final norm; every row's key and value is cached."""
        out = torch.empty(sum(chunk.num_tokens for chunk in chunks), self._hidden_size, dtype=torch.bfloat16)
        self._step(cache, chunks, None, out)
        return out

    def carry(self, cache: KVCache, chunks: Sequence[Chunk], hidden: Tensor) -> None:
        """As `runner.carry_chunks`: the residual stream through the layers, in place."""
        self._step(cache, chunks, hidden, None)

    def finish(self, cache: KVCache, chunks: Sequence[Chunk], hidden: Tensor) -> Tensor:
        """As `run`, from the residual stream of the rows, which is used up."""
        out = torch.empty(hidden.shape, dtype=torch.bfloat16)
        self._step(cache, chunks, hidden, out)
        return out

    def _step(self, cache: KVCache, chunks: Sequence[Chunk], hidden: Tensor | None, out: Tensor | None) -> None:
        """hidden: (rows, hidden) float32 and contiguous, in place of embeddings."""
        assert hidden is None or (hidden.dtype == torch.float32 and hidden.is_contiguous())
        ids = torch.tensor([i for chunk in chunks for i in chunk.ids])
        positions = torch.tensor([p for chunk in chunks for p in range(chunk.start, chunk.end)])
        sequences = torch.tensor([i for i, c in enumerate(chunks) for _ in range(c.num_tokens)], dtype=torch.int32)
        width = max(len(chunk.sequence.blocks) for chunk in chunks)
        padded = [chunk.sequence.blocks + [0] * (width - len(chunk.sequence.blocks)) for chunk in chunks]
        tables = torch.tensor(padded, dtype=torch.int32)
        batch = _CBatch(
            cache.address,
            cache.scales_address,
            cache.layer_stride,
            cache.scales_layer_stride,
            ids.data_ptr(),
            positions.data_ptr(),
            tables.data_ptr(),
            sequences.data_ptr(),
            ids.shape[0],
            width,
            None if hidden is None else hidden.data_ptr(),
            None if out is None else out.data_ptr(),
        )
        self._call(ctypes.byref(self._model), ctypes.byref(batch), torch.get_num_threads())

    def _layer(self, source: DecoderLayer, layer: PreparedLayer) -> _CLayer:
        attention = source.self_attn
        return _CLayer(
            self._norm(source.input_layernorm),
            self._norm(source.post_attention_layernorm),
            self._norm(attention.q_norm),
            self._norm(attention.k_norm),
            *(_c_matrix(linear.kernel) for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)),
        )

    def _norm(self, norm: object) -> int | None:
        """The address of a copy of its weight in float32."""
        if norm is None:
            return None
        weight = getattr(norm, "weight", None)
        assert isinstance(weight, Tensor)
        copied = weight.detach().to(torch.float32, copy=True).contiguous()
        self._kept.append(copied)
        return copied.data_ptr()


def why_no_native_step(spec: DecoderSpec, layers: Sequence[PreparedLayer]) -> str | None:
    """None if the native step computes this model, else the reason, as one word of a log line."""
    form = (spec.norm, spec.block, spec.positions, spec.activation)
    if form != _ONE_FORM:
        return "form_" + "_".join(form)
    if spec.num_turned != spec.head_dim or spec.mlp_bias or spec.embedding_norm:
        return f"form_turned_{spec.num_turned}_mlp_bias_{spec.mlp_bias}_embedding_norm_{spec.embedding_norm}"
    if spec.head_dim % _HEAD_DIM_MULTIPLE or spec.head_dim > _MAX_HEAD_DIM:
        return f"head_dim_{spec.head_dim}"
    if spec.hidden_size % _WIDTH_MULTIPLE or spec.intermediate_size % _WIDTH_MULTIPLE:
        return f"widths_{spec.hidden_size}_{spec.intermediate_size}"
    for layer in layers:
        for linear in (layer.qkv, layer.out, layer.gate_up, layer.down):
            if not isinstance(linear.kernel, NativeLinear):
                return f"{linear.parts[0][0]}_is_not_packed"
    return None


def build_native_step(decoder: Decoder, layers: Sequence[PreparedLayer], embedding: Tensor) -> NativeStep | None:
    """The native step of a model prepared with native kernels, or None; logs which."""
    reason = why_no_native_step(decoder.spec, layers)
    if reason is not None:
        logger.info("decode_step_chosen name=torch reason=%s", reason)
        return None
    logger.info("decode_step_chosen name=native")
    return NativeStep(decoder, layers, embedding)


def _c_matrix(kernel: object) -> CMatrix:
    assert isinstance(kernel, NativeLinear)
    return kernel.c_matrix
