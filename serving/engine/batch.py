"""What one forward pass needs to know about its rows, computed once a step and shared by all layers.

Rows are the step's tokens, chunk after chunk. Chunks of one token that read their whole context (decoding) are
attended in groups of similar length; longer chunks (prefill) one by one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import pairwise

import torch

from serving.engine.adapters import Adapter, AdapterRows
from serving.engine.kv_blocks import BLOCK_SIZE, blocks_for
from serving.engine.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """One-token chunks whose contexts need a similar number of blocks, padded to the longest."""

    rows: torch.Tensor  # (sequences,) int64, rows of the batch
    block_table: torch.Tensor  # (sequences, blocks) int64, padded with block 0
    contexts: torch.Tensor  # (sequences,) int64, tokens to attend to
    # (sequences, 1, 1, blocks * BLOCK_SIZE) bool, True where there is a token to attend to; with ALiBi what is added to
    # the scores, (sequences, kv heads, query heads of each, blocks * BLOCK_SIZE), -inf elsewhere
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """A chunk attended by itself. Its context lies in consecutive slots when `first_slot` is given."""

    first_row: int
    num_rows: int
    context: int  # tokens to attend to for the last row, itself included
    first_slot: int | None
    block_table: torch.Tensor  # (1, blocks) int64
    # (rows, context) bool, True where a row may look; None if it is plain causal or one row. With ALiBi always there,
    # what is added to the scores: (kv heads, query heads of each, rows, context), of one row with a 1 in front instead
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class StepBatch:
    ids: torch.Tensor  # (rows,) int64
    positions: torch.Tensor  # (rows,) int64
    slots: torch.Tensor  # (rows,) int64, where each row's key and value go
    decode_groups: Items[DecodeGroup]
    spans: Items[Span]
    adapter_rows: Items[AdapterRows]


def build_batch(chunks: Items[Chunk]) -> StepBatch:
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    first_rows: list[int] = []
    for chunk in chunks:
        first_rows.append(len(ids))
        ids += chunk.ids
        positions += range(chunk.start, chunk.end)
        slots += [chunk.sequence.slot_of(position) for position in range(chunk.start, chunk.end)]
    groups, spans = _split(chunks, first_rows)
    return StepBatch(
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        decode_groups=groups,
        spans=spans,
        adapter_rows=_adapter_rows(chunks, first_rows),
    )


def _split(chunks: Items[Chunk], first_rows: Items[int]) -> tuple[list[DecodeGroup], list[Span]]:
    by_size: defaultdict[int, list[tuple[Chunk, int]]] = defaultdict(list)
    spans: list[Span] = []
    for chunk, first_row in zip(chunks, first_rows, strict=True):
        if chunk.num_tokens > 1:
            spans.append(_span(chunk, first_row))
        else:
            # Powers of two: padding at most doubles what a group reads.
            by_size[blocks_for(chunk.end).bit_length()].append((chunk, first_row))
    groups: list[DecodeGroup] = []
    for members in by_size.values():
        if len(members) == 1:
            spans.append(_span(*members[0]))
        else:
            groups.append(_decode_group(members))
    return groups, spans


def _span(chunk: Chunk, first_row: int) -> Span:
    blocks = chunk.sequence.blocks[: blocks_for(chunk.end)]
    is_run = all(after - before == 1 for before, after in pairwise(blocks))
    mask = None
    if chunk.num_tokens > 1 and chunk.start > 0:
        mask = torch.arange(chunk.end) <= torch.arange(chunk.start, chunk.end).unsqueeze(1)
    return Span(
        first_row=first_row,
        num_rows=chunk.num_tokens,
        context=chunk.end,
        first_slot=blocks[0] * BLOCK_SIZE if is_run else None,
        block_table=torch.tensor([blocks]),
        mask=mask,
    )


def _decode_group(members: Items[tuple[Chunk, int]]) -> DecodeGroup:
    num_blocks = max(blocks_for(chunk.end) for chunk, _ in members)
    table = torch.zeros(len(members), num_blocks, dtype=torch.int64)
    for index, (chunk, _) in enumerate(members):
        blocks = chunk.sequence.blocks[: blocks_for(chunk.end)]
        table[index, : len(blocks)] = torch.tensor(blocks)
    contexts = torch.tensor([chunk.end for chunk, _ in members])
    is_context = torch.arange(num_blocks * BLOCK_SIZE) < contexts.unsqueeze(1)
    return DecodeGroup(
        rows=torch.tensor([row for _, row in members]),
        block_table=table,
        contexts=contexts,
        mask=is_context.view(len(members), 1, 1, -1),
    )


def _adapter_rows(chunks: Items[Chunk], first_rows: Items[int]) -> list[AdapterRows]:
    rows: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    adapters: dict[tuple[str, int], Adapter] = {}
    for chunk, first_row in zip(chunks, first_rows, strict=True):
        adapter = chunk.sequence.adapter
        if adapter is not None:
            key = (adapter.name, adapter.version)
            adapters[key] = adapter
            rows[key] += range(first_row, first_row + chunk.num_tokens)
    return [AdapterRows(adapters[key], torch.tensor(indices)) for key, indices in rows.items()]
