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
    """Which two of the dimensions that turn belong together; `turned` of them, all of a head's or its first.

    pair:    the first and the second of every pair, (..., turned / 2) each -> (..., turned)
    partner: (..., turned) -> the same with the two of every pair exchanged
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
    Positions.ALIBI: RotaryForm(_pair_halves, _partner_in_other_half),  # of no dimensions
}


def rotary_frequencies(spec: DecoderSpec, device: torch.device | str = "cpu") -> Tensor:
    """Radians per position of each pair of dimensions that turns, (num_turned / 2,) float32, fastest first."""
    exponents = torch.arange(0, spec.num_turned, 2, dtype=torch.float32, device=device) / spec.num_turned
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
    """(cos, signed sin) for integer positions (...), each (..., turned) float32.

    The sine is negative for the first of a pair: a turned dimension is x * cos + partner * signed sin.
    """
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    cos, sin = angles.cos(), angles.sin()
    return form.pair(cos, cos), form.pair(-sin, sin)


def apply_rotary(form: RotaryForm, heads: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turn the first of `heads`' dimensions, as many as the tables have, in float32; returned in its own type.

    heads: (..., head_dim); the tables broadcast against it but for the last dimension, (..., turned)
    """
    turned = cos.shape[-1]
    x = heads[..., :turned].to(torch.float32)
    x = (x * cos + form.partner(x) * signed_sin).to(heads.dtype)
    return x if turned == heads.shape[-1] else torch.cat((x, heads[..., turned:]), dim=-1)


def alibi_slopes(num_heads: int) -> Tensor:
    """What a score loses for each token of distance, (heads,) float32: geometric from 2 ** (-8 / heads).

    Source: arXiv:2108.12409, section 3. For a number of heads between powers of two the authors' code, which BLOOM was
    trained with, appends every second slope of the next power's.
    """
    power = 1 << (num_heads.bit_length() - 1)
    exponents = [8 * (head + 1) / power for head in range(power)]
    exponents += [4 * (2 * head + 1) / power for head in range(num_heads - power)]
    return torch.tensor([2.0**-exponent for exponent in exponents])


def alibi_bias(slopes: Tensor, context: int, first_query: int, num_queries: int) -> Tensor:
    """What is added to the scores of consecutive queries, (*slopes' shape, queries, context) float32.

    -slope * distance to the keys up to the query's own position, -inf to those behind it.
    """
    queries = torch.arange(first_query, first_query + num_queries, device=slopes.device)
    distance = queries.unsqueeze(-1) - torch.arange(context, device=slopes.device)  # (queries, context)
    bias = slopes[..., None, None] * -distance
    return bias.masked_fill_(distance < 0, -math.inf)


def _no_bias(q: Tensor) -> None:
    return None


def _distance_bias(q: Tensor) -> Tensor:
    length, num_heads = q.shape[-3:-1]
    return alibi_bias(alibi_slopes(num_heads).to(q.device), length, 0, length).to(q.dtype)


# Queries (..., seq, heads, head_dim) -> what to add to causal scores, (heads, seq, seq) in their type; None: nothing.
POSITION_BIASES: Mapping[Positions, Callable[[Tensor], Tensor | None]] = {
    Positions.ROTARY_HALVES: _no_bias,
    Positions.ROTARY_INTERLEAVED: _no_bias,
    Positions.ALIBI: _distance_bias,
}


def causal_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each position attends to itself and those before it, scores scaled by head_dim ** -0.5.

    q: (batch, heads, seq, head_dim); k, v: (batch, kv_heads, seq, head_dim), heads a multiple of kv_heads.
    bias: (heads, seq, seq) to add to the scaled scores, in q's type, -inf where a key lies behind its query.
    Returns (batch, heads, seq, head_dim). Query head h reads key/value head h // (heads / kv_heads).
    """
    is_shared = q.shape[1] != k.shape[1]
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, is_causal=bias is None, enable_gqa=is_shared
    )
