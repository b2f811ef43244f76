"""Logits of a whole sequence on the path that serves: what the quantisation report measures beside the plain decoder.

Same kernels, same cache and same attention as the engine, in chunks as a prefill would take them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serving.engine.kv_blocks import BlockAllocator, KVCache, KVLayout, blocks_for
from serving.engine.prepare import PreparedModel
from serving.engine.requests import ScoreRequest
from serving.engine.runner import run_chunks
from serving.engine.scheduler import EngineLimits, Scheduler
from serving.engine.sequence import Sequence


@torch.inference_mode()
def serving_logits(model: PreparedModel, ids: Tensor, *, chunk_tokens: int = 256, int8_kv: bool = False) -> Tensor:
    """ids (seq,) -> logits (seq, vocabulary) float32."""
    num_blocks = blocks_for(ids.shape[0])
    cache = KVCache(KVLayout.of(model.spec, model.dtype, is_int8=int8_kv), num_blocks)
    scheduler = Scheduler(BlockAllocator(num_blocks), EngineLimits(max_step_tokens=chunk_tokens))
    known: list[int] = ids.tolist()
    sequence = Sequence(ScoreRequest(request_id="logits", ids=known), 0, 0, known, len(known))
    scheduler.add(sequence)
    parts: list[Tensor] = []
    while sequence.num_pending:
        chunks = scheduler.plan()
        parts.append(model.head(run_chunks(model, cache, chunks)))
        scheduler.commit(chunks)
    return torch.cat(parts)
