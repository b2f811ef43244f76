"""Logits of a whole sequence on the path that serves, from a model that is wholly in memory.

Same kernels, same cache and same attention as the engine, in chunks as a prefill would take them. The quantisation
report measures the same with one layer in memory at a time: `serving.engine.layered_logits`.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Final

import torch
from torch import Tensor

from serving.engine.kv_blocks import BlockAllocator, KVCache, KVLayout, blocks_for
from serving.engine.prepare import PreparedModel
from serving.engine.requests import ScoreRequest
from serving.engine.runner import run_chunks
from serving.engine.scheduler import Chunk, EngineLimits, Scheduler
from serving.engine.sequence import Sequence

CHUNK_TOKENS: Final = 256


@torch.inference_mode()
def serving_logits(
    model: PreparedModel, ids: Tensor, *, chunk_tokens: int = CHUNK_TOKENS, int8_kv: bool = False
) -> Tensor:
    """ids (seq,) -> logits (seq, vocabulary) float32."""
    cache = KVCache(KVLayout.of(model.spec, model.dtype, is_int8=int8_kv), blocks_for(ids.shape[0]))
    return torch.cat([model.head(run_chunks(model, cache, [chunk])) for chunk in prefill_chunks(ids, chunk_tokens)])


def prefill_chunks(ids: Tensor, chunk_tokens: int = CHUNK_TOKENS) -> Generator[Chunk]:
    """The chunks in which a sequence (seq,) of ids alone in its cache is computed; each is done when the next comes."""
    scheduler = Scheduler(BlockAllocator(blocks_for(ids.shape[0])), EngineLimits(max_step_tokens=chunk_tokens))
    known: list[int] = ids.tolist()
    sequence = Sequence(ScoreRequest(request_id="logits", ids=known), 0, 0, known, len(known))
    scheduler.add(sequence)
    while sequence.num_pending:
        chunks = scheduler.plan()
        yield from chunks
        scheduler.commit(chunks)
