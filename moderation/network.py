"""The encoder as a torch module, for training only: a post-norm BERT trunk, two poolings, one logit for each output.

Served by `moderation.encoder`, which is the same arithmetic in numpy; a test compares the two. torch is imported here
and nowhere else in `moderation` except by what trains.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moderation.encoder import EncoderShape

__all__ = ["Network"]


class Layer(nn.Module):
    """Attention, then a GELU network, each added to its input and normalised afterwards (arXiv:1810.04805)."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.hidden, 3 * shape.hidden)
        self.out = nn.Linear(shape.hidden, shape.hidden)
        self.attention_norm = nn.LayerNorm(shape.hidden, eps=shape.eps)
        self.up = nn.Linear(shape.hidden, shape.inner)
        self.down = nn.Linear(shape.inner, shape.hidden)
        self.output_norm = nn.LayerNorm(shape.hidden, eps=shape.eps)

    def forward(self, states: Tensor, is_token: Tensor, dropout: float) -> Tensor:
        """states: (batch, tokens, hidden); is_token: (batch, tokens) bool, False on padding. Returns the same shape."""
        batch, tokens, hidden = states.shape
        qkv = self.qkv(states).view(batch, tokens, 3, self.heads, hidden // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, tokens, head size)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=is_token[:, None, None, :])
        mixed = self.out(mixed.transpose(1, 2).reshape(batch, tokens, hidden))
        states = self.attention_norm(states + functional.dropout(mixed, dropout, self.training))
        inner = self.down(functional.gelu(self.up(states), approximate="tanh"))
        return self.output_norm(states + functional.dropout(inner, dropout, self.training))


class Network(nn.Module):
    """Token ids to logits. `pool` is a learnt attention over tokens beside their plain mean."""

    def __init__(self, shape: EncoderShape, num_outputs: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.shape = shape
        self.dropout = dropout
        self.words = nn.Embedding(shape.vocab, shape.hidden)
        self.places = nn.Embedding(shape.positions, shape.hidden)
        self.norm = nn.LayerNorm(shape.hidden, eps=shape.eps)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.pool = nn.Linear(shape.hidden, 1)
        self.head = nn.Linear(2 * shape.hidden, num_outputs)

    def forward(self, ids: Tensor, is_token: Tensor) -> Tensor:
        """ids: (batch, tokens) int64; is_token: the same shape, bool, False on padding. Returns (batch, outputs)."""
        pooled = self._pooled(self.states(ids, is_token).float(), is_token)
        return self.head(functional.dropout(pooled, self.dropout, self.training))

    def states(self, ids: Tensor, is_token: Tensor) -> Tensor:
        """What the last layer makes of each token, (batch, tokens, hidden)."""
        places = self.places.weight[: ids.shape[1]]
        states = functional.dropout(self.norm(self.words(ids) + places), self.dropout, self.training)
        for layer in self.layers:
            states = layer(states, is_token, self.dropout)
        return states

    def _pooled(self, states: Tensor, is_token: Tensor) -> Tensor:
        """(batch, tokens, hidden) to (batch, 2 * hidden): the mean over tokens, and their learnt weighting."""
        weight = is_token.float()[:, :, None]
        mean = (states * weight).sum(1) / weight.sum(1)
        focus = torch.softmax(self.pool(states).masked_fill(~is_token[:, :, None], float("-inf")), dim=1)
        return torch.cat([mean, (states * focus).sum(1)], dim=1)
