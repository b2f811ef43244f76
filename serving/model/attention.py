"""Rotary positions and plain causal attention: pure functions on tensors, the reference for every faster path.

Attention here recomputes the whole sequence. The engine's backend, which reads a paged cache, is compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from serving.model.spec import DecoderSpec, Positions, RopeScaling


@dataclass(frozen=True, slots=True)
class RotaryForm:
    """Which two dimensions of a head turn together.

    pair:    the first and the second of every pair, (..., head_dim / 2) each -> (..., head_dim)
    partner: (..., head_dim) -> the same with the two of every pair exchanged
    """

    pair: Callable[[Tensor, Tensor], Tensor]
    partner: Callable[[Tensor], Tensor]


def _pair_halves(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat((first, second), dim=-1)


def _pair_neighbours(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack((first, second), dim=-1).flatten(-2)


def _partner_in_other_half(x: Tensor) -> Tensor:
    return x.roll(x.shape[-1] // 2, dims=-1)


def _partner_beside(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


ROTARY_FORMS: Mapping[Positions, RotaryForm] = {
    Positions.ROTARY_HALVES: RotaryForm(_pair_halves, _partner_in_other_half),
    Positions.ROTARY_INTERLEAVED: RotaryForm(_pair_neighbours, _partner_beside),
}


def rotary_frequencies(spec: DecoderSpec, device: torch.device | str = "cpu") -> Tensor:
    """Radians per position of each pair of dimensions, (head_dim / 2,) float32, fastest first."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32, device=device) / spec.head_dim
    frequencies = 1.0 / spec.rope_theta**exponents
    return frequencies if spec.rope_scaling is None else _stretch_slow(frequencies, spec.rope_scaling)


def _stretch_slow(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3: slow waves are `factor` times longer, fast ones as they were, a linear blend between.

    Source: arXiv:2407.21783, section 3.2, and the constants' use in the released reference code.
    """
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)  # within the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return blend * frequencies + (1.0 - blend) * frequencies / scaling.factor


def rotary_tables(form: RotaryForm, frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, signed sin) for integer positions (...), each (..., head_dim) float32.

    The sine is negative for the first of a pair: a turned dimension is x * cos + partner * signed sin.
    """
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    cos, sin = angles.cos(), angles.sin()
    return form.pair(cos, cos), form.pair(-sin, sin)


def apply_rotary(form: RotaryForm, heads: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turn `heads` (..., head_dim) by tables that broadcast against it, in float32; returned in its own type."""
    x = heads.to(torch.float32)
    return (x * cos + form.partner(x) * signed_sin).to(heads.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each position attends to itself and those before it, scores scaled by head_dim ** -0.5.

    q: (batch, heads, seq, head_dim); k, v: (batch, kv_heads, seq, head_dim), heads a multiple of kv_heads.
    Returns (batch, heads, seq, head_dim). Query head h reads key/value head h // (heads / kv_heads).
    """
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
