"""The decoder itself, plain and differentiable: the reference of the engine, and the module that training trains.

Modules and parameters carry Hugging Face's names, so a checkpoint loads without renaming and adapters load elsewhere.
What differs between families is read from the spec when modules are built; a forward never asks for the family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from quant.errors import CheckpointError
from serving.model.attention import ROTARY_FORMS, apply_rotary, causal_attention, rotary_frequencies, rotary_tables
from serving.model.spec import Activation, BlockForm, DecoderSpec, Norm, Positions

_EMBEDDING_STD = 0.02
_IMPLEMENTED = (*Norm, *BlockForm, Positions.ROTARY_HALVES, Positions.ROTARY_INTERLEAVED, Activation.SWIGLU)


class RmsNorm(nn.Module):
    """Divide by the root mean square over the last dimension, in float32; then scale in the input's type."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class LayerNorm(nn.Module):
    """Without a bias: centre, divide by the standard deviation and scale, all in float32."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(torch.float32)
        return functional.layer_norm(x.to(torch.float32), weight.shape, weight, None, self.eps).to(x.dtype)


_NORMS: Mapping[Norm, type[RmsNorm | LayerNorm]] = {Norm.RMS: RmsNorm, Norm.LAYER: LayerNorm}


class Attention(nn.Module):
    """Projections around causal attention. `q_norm` and `k_norm` are None where the family has none."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module | None
    k_norm: nn.Module | None

    def __init__(self, spec: DecoderSpec, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.rotary_form = ROTARY_FORMS[spec.positions]
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, q_size, bias=spec.qkv_bias, dtype=dtype, device=device)
        self.k_proj = nn.Linear(spec.hidden_size, kv_size, bias=spec.qkv_bias, dtype=dtype, device=device)
        self.v_proj = nn.Linear(spec.hidden_size, kv_size, bias=spec.qkv_bias, dtype=dtype, device=device)
        self.o_proj = nn.Linear(q_size, spec.hidden_size, bias=spec.out_bias, dtype=dtype, device=device)
        self.q_norm = RmsNorm(spec.head_dim, spec.norm_eps, dtype=dtype, device=device) if spec.qk_norm else None
        self.k_norm = RmsNorm(spec.head_dim, spec.norm_eps, dtype=dtype, device=device) if spec.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        mixed = causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (batch, heads, seq, dim)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., hidden) and `Decoder.rotary`'s tables (..., head_dim) -> normed and turned q, k, and v.

        Each is (..., heads, head_dim).
        """
        q: Tensor = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k: Tensor = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v: Tensor = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return apply_rotary(self.rotary_form, q, cos, sin), apply_rotary(self.rotary_form, k, cos, sin), v


class FeedForward(nn.Module):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, spec: DecoderSpec, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        hidden, inner = spec.hidden_size, spec.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False, dtype=dtype, device=device)
        self.up_proj = nn.Linear(hidden, inner, bias=False, dtype=dtype, device=device)
        self.down_proj = nn.Linear(inner, hidden, bias=False, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """`post_attention_layernorm` is None in a parallel block: both halves read `input_layernorm`'s output."""

    post_attention_layernorm: RmsNorm | LayerNorm | None

    def __init__(self, spec: DecoderSpec, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.input_layernorm = _hidden_norm(spec, dtype=dtype, device=device)
        self.self_attn = Attention(spec, dtype=dtype, device=device)
        is_sequential = spec.block is BlockForm.SEQUENTIAL
        self.post_attention_layernorm = _hidden_norm(spec, dtype=dtype, device=device) if is_sequential else None
        self.mlp = FeedForward(spec, dtype=dtype, device=device)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = self.input_layernorm(hidden)
        hidden = hidden + self.self_attn(normed, cos, sin)
        if self.post_attention_layernorm is not None:
            normed = self.post_attention_layernorm(hidden)
        return hidden + self.mlp(normed)


class Trunk(nn.Module):
    """Everything below the head; a module of its own because Hugging Face's names start with `model.`."""

    def __init__(self, spec: DecoderSpec, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.embed_tokens = _embedding(spec, dtype=dtype, device=device)
        self.layers = nn.ModuleList(DecoderLayer(spec, dtype=dtype, device=device) for _ in range(spec.num_layers))
        self.norm = _hidden_norm(spec, dtype=dtype, device=device)


class Decoder(nn.Module):
    """A causal language model. `lm_head` is None where the head is tied to the embeddings.

    Built with small random values; checkpoints come from `serving.model.weights.load_decoder`.
    """

    lm_head: nn.Module | None

    def __init__(
        self, spec: DecoderSpec, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        _require_implemented(spec)
        self.spec = spec
        self.model = Trunk(spec, dtype=dtype, device=device)
        self.lm_head = (
            None
            if spec.tied_embeddings
            else nn.Linear(spec.hidden_size, spec.vocab_size, bias=False, dtype=dtype, device=device)
        )

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    def iterate_layers(self) -> Iterator[DecoderLayer]:
        """The layers with their type, which `nn.ModuleList` does not keep."""
        return (cast("DecoderLayer", layer) for layer in self.model.layers)

    def embed(self, ids: Tensor) -> Tensor:
        """ids (...) integers -> (..., hidden)."""
        return self.model.embed_tokens(ids)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, signed sin) of integer positions (...), each (..., head_dim) float32."""
        # Computed at each call: as a buffer the frequencies would be rounded by .to(bfloat16) and lost by to_empty().
        form = ROTARY_FORMS[self.spec.positions]
        return rotary_tables(form, rotary_frequencies(self.spec, positions.device), positions)

    def final_norm(self, hidden: Tensor) -> Tensor:
        return self.model.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed hidden (..., hidden) -> (..., vocab), by the head's own weights or the embeddings'."""
        if self.lm_head is None:
            logits = functional.linear(hidden, self.model.embed_tokens.weight)
        else:
            logits = self.lm_head(hidden)
        return logits if self.spec.logit_scale == 1.0 else logits * self.spec.logit_scale

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """ids (batch, seq) -> logits (batch, seq, vocab).

        `positions` (seq,) or (batch, seq) default to 0, 1, ...; they turn queries and keys and do not change who sees
        whom. Padding on the right needs no mask: nothing before it can see it.
        """
        if positions is None:
            positions = torch.arange(ids.shape[-1], device=ids.device)
        cos, sin = self.rotary(positions)
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin)
        return self.logits(self.final_norm(hidden))


def _hidden_norm(spec: DecoderSpec, *, dtype: torch.dtype, device: torch.device | str) -> RmsNorm | LayerNorm:
    return _NORMS[spec.norm](spec.hidden_size, spec.norm_eps, dtype=dtype, device=device)


def _embedding(spec: DecoderSpec, *, dtype: torch.dtype, device: torch.device | str) -> nn.Embedding:
    weight = torch.empty(spec.vocab_size, spec.hidden_size, dtype=dtype, device=device)
    # Drawing normal numbers on the meta device, as nn.Embedding would, imports torch's compiler: seconds and 80 MB.
    if not weight.is_meta:
        nn.init.normal_(weight, std=_EMBEDDING_STD)
    return nn.Embedding.from_pretrained(weight, freeze=False)


def _require_implemented(spec: DecoderSpec) -> None:
    for form in (spec.norm, spec.block, spec.positions, spec.activation):
        if form not in _IMPLEMENTED:
            raise CheckpointError(f"{type(form).__name__} {form.value!r} is not implemented")
