"""One forward pass of a prepared model over a step's rows and the paged cache: ids in, final hidden states out.

This is the replaceable decode step: a native kernel or a device backend takes the place of `run_step` with the same
arguments. The plain reference is `Decoder.forward`; tests hold the two together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from serving.engine.adapters import AdapterRows, add_deltas
from serving.engine.alibi import with_alibi
from serving.engine.batch import DecodeGroup, Span, StepBatch, build_batch
from serving.engine.kv_blocks import KVCache
from serving.engine.prepare import FusedLinear, PreparedLayer, PreparedModel
from serving.engine.scheduler import Chunk
from serving.model.attention import RotaryForm
from serving.model.spec import DecoderSpec
from serving.model.transformer import ActivationForm


def run_chunks(model: PreparedModel, cache: KVCache, chunks: Sequence[Chunk]) -> Tensor:
    """One forward pass, each chunk the fastest way: natively where the model and the chunk allow it, else `run_step`.

    Returns what `run_step` does, rows in the order of the chunks.
    """
    native = model.native
    if native is None:
        return run_step(model, cache, build_batch(chunks))
    taken = [chunk for chunk in chunks if native.takes(chunk)]
    if len(taken) == len(chunks):
        return native.run(cache, chunks)
    others = [chunk for chunk in chunks if not native.takes(chunk)]
    parts = _by_chunk(others, run_step(model, cache, build_batch(others)))
    if taken:
        parts |= _by_chunk(taken, native.run(cache, taken))
    return torch.cat([parts[chunk.sequence.arrival] for chunk in chunks])


def _by_chunk(chunks: Sequence[Chunk], hidden: Tensor) -> dict[int, Tensor]:
    """The rows of every chunk, by its sequence's running number; a step has at most one chunk of a sequence."""
    rows = hidden.split([chunk.num_tokens for chunk in chunks])
    return {chunk.sequence.arrival: part for chunk, part in zip(chunks, rows, strict=True)}


def carry_chunks(model: PreparedModel, cache: KVCache, chunks: Sequence[Chunk], hidden: Tensor) -> None:
    """The part of `run_chunks` between embeddings and final norm, in place. Chunks have no adapters.

    hidden: (rows, hidden) float32, rows in the order of the chunks
    """
    if model.native is not None:
        model.native.carry(cache, chunks, hidden)
    else:
        hidden.copy_(_run_layers(model, cache, build_batch(chunks), hidden))


def finish_chunks(model: PreparedModel, cache: KVCache, chunks: Sequence[Chunk], hidden: Tensor) -> Tensor:
    """The last part of `run_chunks`, of a model without layers. hidden: as above, used up."""
    assert not model.layers
    if model.native is not None:
        return model.native.finish(cache, chunks, hidden)
    return model.final_norm(hidden, model.dtype)


def run_step(model: PreparedModel, cache: KVCache, batch: StepBatch) -> Tensor:
    """Hidden states after the final norm, (rows, hidden) in the model's dtype. Writes every row's key and value."""
    hidden = _run_layers(model, cache, batch, embed_rows(model, batch.ids))
    return model.final_norm(hidden, model.dtype)


def embed_rows(model: PreparedModel, ids: Tensor) -> Tensor:
    """ids (rows,) -> (rows, hidden) float32: the residual stream stays in that."""
    hidden = functional.embedding(ids, model.embedding).to(torch.float32)
    return hidden if model.embedding_norm is None else model.embedding_norm(hidden, torch.float32)


def _run_layers(model: PreparedModel, cache: KVCache, batch: StepBatch, hidden: Tensor) -> Tensor:
    """hidden: (rows, hidden) float32, used up; returns the same after the last layer."""
    rotary = _rotary_tables(model, batch.positions)
    if model.alibi_slopes is not None:
        batch = with_alibi(batch, model.alibi_slopes, model.dtype)
    for index, layer in enumerate(model.layers):
        hidden = _run_layer(model, layer, index, cache, batch, hidden, rotary)
    return hidden


def _rotary_tables(model: PreparedModel, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and signed sin, each (rows, 1, turned) in the model's dtype, for `_rotate`."""
    cos, signed_sin = model.rotary(positions)
    return cos.to(model.dtype).unsqueeze(1), signed_sin.to(model.dtype).unsqueeze(1)


def _run_layer(
    model: PreparedModel,
    layer: PreparedLayer,
    index: int,
    cache: KVCache,
    batch: StepBatch,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    spec = model.spec
    adapters = batch.adapter_rows
    normed = layer.input_norm(hidden, model.dtype)
    qkv = _apply(layer.qkv, normed, adapters)
    queries = _rotate_and_store(model, layer, index, cache, batch, qkv, rotary)
    attended = _apply(layer.out, _attend(cache, index, batch, queries, spec), adapters)
    # A feed-forward beside attention reads the input before anything is added to it.
    if layer.is_parallel and layer.post_attention_norm is not None:
        normed = layer.post_attention_norm(hidden, model.dtype)
    hidden = hidden.add_(attended)
    if not layer.is_parallel and layer.post_attention_norm is not None:
        normed = layer.post_attention_norm(hidden, model.dtype)
    activated = _activate(model.activation, _apply(layer.gate_up, normed, adapters))
    return hidden.add_(_apply(layer.down, activated, adapters))


def _activate(form: ActivationForm, gate_up: Tensor) -> Tensor:
    """(rows, gate and inner) where there is a gate, else (rows, inner) -> (rows, inner)."""
    if not form.is_gated:
        return form.function(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return form.function(gate).mul_(up)


def _apply(linear: FusedLinear, x: Tensor, adapters: Sequence[AdapterRows]) -> Tensor:
    output = linear.kernel(x)
    if adapters:
        add_deltas(output, x, linear.parts, adapters)
    return output


def _rotate_and_store(
    model: PreparedModel,
    layer: PreparedLayer,
    index: int,
    cache: KVCache,
    batch: StepBatch,
    qkv: Tensor,
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    """Rotate queries and keys in place, cache keys and values; returns queries (rows, q heads, head dim)."""
    spec = model.spec
    query_width = spec.num_heads * spec.head_dim
    num_rotated = spec.num_heads + spec.num_kv_heads
    rotated = qkv[:, : num_rotated * spec.head_dim].unflatten(1, (num_rotated, spec.head_dim))
    if layer.q_norm is not None and layer.k_norm is not None:
        queries, keys = rotated.split((spec.num_heads, spec.num_kv_heads), dim=1)
        queries.copy_(layer.q_norm(queries.to(torch.float32), qkv.dtype))
        keys.copy_(layer.k_norm(keys.to(torch.float32), qkv.dtype))
    _rotate(rotated, *rotary, model.rotary_form)
    cache.write(index, batch.slots, qkv[:, query_width:])
    return rotated[:, : spec.num_heads]


def _rotate(x: Tensor, cos: Tensor, signed_sin: Tensor, form: RotaryForm) -> None:
    """x * cos + partner * signed sin in place, for a head's first dimensions. x: (rows, heads, head dim)."""
    turned = x[..., : cos.shape[-1]]
    partner = form.partner(turned)
    turned.mul_(cos).addcmul_(partner, signed_sin)


def _attend(cache: KVCache, index: int, batch: StepBatch, queries: Tensor, spec: DecoderSpec) -> Tensor:
    """Attention of every row over its own sequence. queries: (rows, q heads, head dim); returns (rows, q width)."""
    width = spec.num_heads * spec.head_dim
    if len(batch.spans) == 1 and not batch.decode_groups:
        return _attend_span(cache, index, batch.spans[0], queries, spec).reshape(queries.shape[0], width)
    attended = torch.empty(queries.shape[0], width, dtype=queries.dtype)
    for group in batch.decode_groups:
        attended.index_copy_(0, group.rows, _attend_group(cache, index, group, queries, spec))
    for span in batch.spans:
        rows = slice(span.first_row, span.first_row + span.num_rows)
        attended[rows] = _attend_span(cache, index, span, queries[rows], spec).reshape(span.num_rows, width)
    return attended


def _attend_group(cache: KVCache, index: int, group: DecodeGroup, queries: Tensor, spec: DecoderSpec) -> Tensor:
    keys, values = cache.read_blocks(index, group.block_table)
    # The query heads that share a key head stand where a longer query would: no key is repeated.
    grouped = queries.index_select(0, group.rows).unflatten(1, (spec.num_kv_heads, -1))
    attended = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=group.mask)
    return attended.flatten(1)


def _attend_span(cache: KVCache, index: int, span: Span, queries: Tensor, spec: DecoderSpec) -> Tensor:
    """queries: (span rows, q heads, head dim); returns (span rows, q heads, head dim)."""
    if span.first_slot is not None:
        keys, values = cache.read_run(index, span.first_slot, span.context)
    else:
        padded_keys, padded_values = cache.read_blocks(index, span.block_table)
        keys, values = padded_keys[0, :, : span.context], padded_values[0, :, : span.context]
    if span.num_rows == 1:
        grouped = queries.unflatten(1, (spec.num_kv_heads, -1))  # (1, kv heads, group, head dim)
        return functional.scaled_dot_product_attention(
            grouped, keys.unsqueeze(0), values.unsqueeze(0), attn_mask=span.mask
        )
    group_size = spec.num_heads // spec.num_kv_heads
    grouped = queries.unflatten(1, (spec.num_kv_heads, group_size)).permute(1, 2, 0, 3)
    shape = (spec.num_kv_heads, group_size, span.context, spec.head_dim)
    attended = functional.scaled_dot_product_attention(
        grouped,
        keys.unsqueeze(1).expand(shape),
        values.unsqueeze(1).expand(shape),
        attn_mask=span.mask,
        is_causal=span.mask is None,
    )  # (kv heads, group, rows, head dim)
    return attended.permute(2, 0, 1, 3)
