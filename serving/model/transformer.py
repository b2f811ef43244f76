"""The decoder itself, plain and differentiable: the reference of the engine, and the module that training trains.

Modules and parameters carry the names that Llama's have at Hugging Face, so most checkpoints load without renaming and
adapters load elsewhere; `quant.formats.checkpoint_names` translates other families' names. What differs between
families is read from the spec when modules are built; a forward never asks for the family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from serving.model.attention import (
    POSITION_BIASES,
    ROTARY_FORMS,
    apply_rotary,
    causal_attention,
    rotary_frequencies,
    rotary_tables,
)
from serving.model.spec import Activation, BlockForm, DecoderSpec, Norm

_EMBEDDING_STD = 0.02


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
    """Centre, divide by the standard deviation, scale and, where there is a bias, shift, all in float32."""

    bias: nn.Parameter | None

    def __init__(
        self, size: int, eps: float, *, has_bias: bool = False, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(size, dtype=dtype, device=device)) if has_bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(torch.float32)
        bias = None if self.bias is None else self.bias.to(torch.float32)
        return functional.layer_norm(x.to(torch.float32), weight.shape, weight, bias, self.eps).to(x.dtype)


class _BuildNorm(Protocol):
    def __call__(
        self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device | str
    ) -> RmsNorm | LayerNorm: ...


_NORMS: Mapping[Norm, _BuildNorm] = {
    Norm.RMS: RmsNorm,
    Norm.LAYER: LayerNorm,
    Norm.LAYER_WITH_BIAS: partial(LayerNorm, has_bias=True),
}


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
        self.position_bias = POSITION_BIASES[spec.positions]
        self.attend = causal_attention  # whoever has a faster way for its tensors may exchange it
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, q_size, bias=spec.qkv_bias, dtype=dtype, device=device)
        self.k_proj = nn.Linear(spec.hidden_size, kv_size, bias=spec.qkv_bias, dtype=dtype, device=device)
        self.v_proj = nn.Linear(spec.hidden_size, kv_size, bias=spec.qkv_bias, dtype=dtype, device=device)
        self.o_proj = nn.Linear(q_size, spec.hidden_size, bias=spec.out_bias, dtype=dtype, device=device)
        self.q_norm = RmsNorm(spec.head_dim, spec.norm_eps, dtype=dtype, device=device) if spec.qk_norm else None
        self.k_norm = RmsNorm(spec.head_dim, spec.norm_eps, dtype=dtype, device=device) if spec.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        bias = self.position_bias(q)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mixed = self.attend(q, k, v, bias)  # (batch, heads, seq, dim)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., hidden) and `Decoder.rotary`'s tables (..., turned) -> normed and turned q, k, and v.

        Each is (..., heads, head_dim).
        """
        q: Tensor = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k: Tensor = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v: Tensor = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return apply_rotary(self.rotary_form, q, cos, sin), apply_rotary(self.rotary_form, k, cos, sin), v


@dataclass(frozen=True, slots=True)
class ActivationForm:
    """`function` is of the gate's output where there is one, which then multiplies the second projection's."""

    is_gated: bool
    function: Callable[[Tensor], Tensor]


ACTIVATIONS: Mapping[Activation, ActivationForm] = {
    Activation.SWIGLU: ActivationForm(is_gated=True, function=functional.silu),
    Activation.GELU: ActivationForm(is_gated=False, function=functional.gelu),
    Activation.GELU_TANH: ActivationForm(is_gated=False, function=partial(functional.gelu, approximate="tanh")),
}


class FeedForward(nn.Module):
    """`gate_proj` is None where the activation has no gate."""

    gate_proj: nn.Module | None
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, spec: DecoderSpec, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        form = ACTIVATIONS[spec.activation]

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=spec.mlp_bias, dtype=dtype, device=device)

        self.activation = form.function
        self.gate_proj = linear(spec.hidden_size, spec.intermediate_size) if form.is_gated else None
        self.up_proj = linear(spec.hidden_size, spec.intermediate_size)
        self.down_proj = linear(spec.intermediate_size, spec.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        inner = self.activation(up) if self.gate_proj is None else self.activation(self.gate_proj(x)) * up
        return self.down_proj(inner)


class DecoderLayer(nn.Module):
    """Adds attention and feed-forward to its input; in a parallel block both read that input.

    `post_attention_layernorm` is the feed-forward's own norm, None where it reads `input_layernorm`'s output.
    """

    post_attention_layernorm: RmsNorm | LayerNorm | None

    def __init__(self, spec: DecoderSpec, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.is_parallel = spec.block is not BlockForm.SEQUENTIAL
        self.input_layernorm = _hidden_norm(spec, dtype=dtype, device=device)
        self.self_attn = Attention(spec, dtype=dtype, device=device)
        shares_norm = spec.block is BlockForm.PARALLEL
        self.post_attention_layernorm = None if shares_norm else _hidden_norm(spec, dtype=dtype, device=device)
        self.mlp = FeedForward(spec, dtype=dtype, device=device)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = self.input_layernorm(hidden)
        attended = hidden + self.self_attn(normed, cos, sin)
        if self.post_attention_layernorm is not None:
            normed = self.post_attention_layernorm(hidden if self.is_parallel else attended)
        return attended + self.mlp(normed)


class Trunk(nn.Module):
    """Everything below the head; a module of its own because Hugging Face's names start with `model.`."""

    def __init__(self, spec: DecoderSpec, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.embed_tokens = _embedding(spec, dtype=dtype, device=device)
        self.embed_norm = _hidden_norm(spec, dtype=dtype, device=device) if spec.embedding_norm else None
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
        """ids (...) integers -> (..., hidden), normed where the family norms its embeddings."""
        hidden = self.model.embed_tokens(ids)
        return hidden if self.model.embed_norm is None else self.model.embed_norm(hidden)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, signed sin) of integer positions (...), each (..., turned) float32; `turned` is 0 with ALiBi."""
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
