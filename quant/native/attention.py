"""Causal attention of whole texts in C (attention.c), for a walk over calibration text: no cache outlives a call.

Its twin is `serving.model.attention.causal_attention`, which torch computes for the future as well as for the past.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from quant.native.library import load_library

HEAD_DIM_MULTIPLE = 32
MAX_HEAD_DIM = 256
# attention.c's TEXT_BLOCK.
_SLOT_MULTIPLE = 16

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class NativeAttention:
    """Takes what `causal_attention` takes, and hands on to `plain` what the kernel does not: a bias, odd head sizes,
    and types other than bf16."""

    def __init__(self, library: ctypes.CDLL, plain: Attend) -> None:
        self._attend = library.causerie_attend_texts
        self._attend.restype = None
        self._plain = plain

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """q: (batch, heads, seq, head_dim); k, v: (batch, kv_heads, seq, head_dim). Returns what q is shaped like."""
        head_dim = q.shape[-1]
        if bias is not None or q.dtype != torch.bfloat16 or head_dim % HEAD_DIM_MULTIPLE or head_dim > MAX_HEAD_DIM:
            return self._plain(q, k, v, bias)
        batch, num_heads, length, _ = q.shape
        slots = -(-length // _SLOT_MULTIPLE) * _SLOT_MULTIPLE
        cache = torch.zeros((batch, slots, 2, k.shape[1], head_dim), dtype=torch.bfloat16)
        cache[:, :length, 0], cache[:, :length, 1] = k.transpose(1, 2), v.transpose(1, 2)
        queries = q.transpose(1, 2).to(torch.float32).contiguous()
        mixed = torch.empty_like(queries)
        self._attend(
            ctypes.c_void_p(cache.data_ptr()),
            ctypes.c_void_p(queries.data_ptr()),
            ctypes.c_void_p(mixed.data_ptr()),
            batch,
            length,
            slots,
            num_heads,
            k.shape[1],
            head_dim,
            torch.get_num_threads(),
        )
        return mixed.to(torch.bfloat16).transpose(1, 2)


def faster_attention(plain: Attend) -> Attend:
    """`plain`, in C where this machine can."""
    library = load_library()
    return plain if library is None else NativeAttention(library, plain)
