"""ALiBi in a step over the paged cache: the masks of its attention as what distance takes from the scores.

Built once a step and shared by all layers. Distances and not positions are multiplied, as in the plain decoder: they
stay exact near the query, where the weight is, when the mask is rounded to bfloat16.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from serving.engine.batch import DecodeGroup, Span, StepBatch
from serving.model.attention import alibi_bias


def with_alibi(batch: StepBatch, slopes: Tensor, dtype: torch.dtype) -> StepBatch:
    """The batch with masks in `dtype` that are added to scores. slopes: (kv heads, query heads of each) float32."""
    return replace(
        batch,
        decode_groups=[_bias_group(group, slopes, dtype) for group in batch.decode_groups],
        spans=[_bias_span(span, slopes, dtype) for span in batch.spans],
    )


def _bias_group(group: DecodeGroup, slopes: Tensor, dtype: torch.dtype) -> DecodeGroup:
    distance = group.contexts.unsqueeze(1) - 1 - torch.arange(group.mask.shape[-1])  # (sequences, slots)
    bias = slopes[..., None] * -distance[:, None, None]  # (sequences, kv heads, query heads of each, slots)
    return replace(group, mask=bias.masked_fill_(~group.mask, -math.inf).to(dtype))


def _bias_span(span: Span, slopes: Tensor, dtype: torch.dtype) -> Span:
    bias = alibi_bias(slopes, span.context, span.context - span.num_rows, span.num_rows).to(dtype)
    # One row is attended with its query heads where a longer query would stand.
    return replace(span, mask=bias.squeeze(-2).unsqueeze(0) if span.num_rows == 1 else bias)
