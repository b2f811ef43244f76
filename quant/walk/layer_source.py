"""A model on disk as the walk and the measuring see it: one decoder layer in memory at a time, and its two ends.

`serving.model.layer_source` reads one from a directory; `quant.commands` hands it over.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from quant.walk.tables import Table


class LayerSource(Protocol):
    """Layers are called with (hidden, cos, sin), the tables being what `rotary` returns."""

    @property
    def num_layers(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int:
        """Tokens of the longest text that the model was made for."""
        ...

    @property
    def is_tied(self) -> bool:
        """Whether the embeddings make the logits too, so that there is one table."""
        ...

    @property
    def head_bytes(self) -> int:
        """Of the table that makes logits, as it is stored; the embeddings' where the two are tied."""
        ...

    def layer(self, index: int) -> nn.Module:
        """Read from disk at each call, plain parameters in their stored type, quantised linears as `QuantizedLinear`.

        Raises CheckpointError for tensors that are missing or of another shape.
        """
        ...

    def outline(self) -> nn.Module:
        """A layer without values (on the meta device), for its shapes; all layers have the same."""
        ...

    def layer_bytes(self, index: int) -> int:
        """Of the layer's tensors as they are stored."""
        ...

    def end_bytes(self) -> int:
        """Of everything that belongs to no layer, as it is stored."""
        ...

    def table(self, name: str) -> Table:
        """`model.embed_tokens`, or `lm_head` where it is not tied. Raises CheckpointError if it is misshapen."""
        ...

    def embed(self, ids: Tensor, table: Table | None = None) -> Tensor:
        """ids (...) -> (..., hidden) float32, normed where the family norms them. table: instead of its own."""
        ...

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]: ...

    def final_norm(self, hidden: Tensor) -> Tensor:
        """(..., hidden) float32, likewise."""
        ...

    def logits(self, hidden: Tensor, table: Table | None = None) -> Tensor:
        """Normed hidden (tokens, hidden) float32 -> (tokens, vocabulary) float32. Keeps its own head from then on.

        table: instead of its own head
        """
        ...
