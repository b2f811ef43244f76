"""The sizes of a model on disk that decide what quantising it takes. Reads headers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from torch import nn

from quant.walk.layer_source import LayerSource

# What several linears of a layer read: `LinearSize.reads` of the others is their own name.
SHARED_INPUTS: Final = ("attention input", "feed-forward input")
# The linears that are alone in reading what attention has mixed, and the activations of the feed-forward.
MIXED: Final = "self_attn.o_proj"
WIDEST: Final = "mlp.down_proj"


@dataclass(frozen=True, slots=True)
class LinearSize:
    """`reads`: the names of linears with the same value share their input."""

    outputs: int
    inputs: int
    reads: str

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Of the source. Bytes as they are stored.

    linears:     of one layer, by name such as `mlp.down_proj`; all layers are alike
    layer_bytes: of the largest layer
    end_bytes:   of embeddings, final norm and head; `head_bytes` of the table that makes logits
    is_tied:     whether the embeddings are that table
    is_parallel: attention's output is added at the layer's end, together with the feed-forward's
    """

    num_layers: int
    hidden: int
    vocab: int
    linears: Mapping[str, LinearSize]
    layer_bytes: int
    end_bytes: int
    head_bytes: int
    is_tied: bool = True
    is_parallel: bool = False

    @property
    def layer_weights(self) -> int:
        return sum(linear.weights for linear in self.linears.values())

    @property
    def head_weights(self) -> int:
        return self.vocab * self.hidden

    @property
    def widest_input(self) -> int:
        return max(linear.inputs for linear in self.linears.values())

    @property
    def source_bytes(self) -> int:
        return self.num_layers * self.layer_bytes + self.end_bytes

    @property
    def joined(self) -> Mapping[str, LinearSize]:
        """Linears that share an input, as the one matrix that they are quantised as."""
        groups: dict[str, LinearSize] = {}
        for linear in self.linears.values():
            before = groups.get(linear.reads)
            outputs = linear.outputs + (0 if before is None else before.outputs)
            groups[linear.reads] = replace(linear, outputs=outputs)
        return groups


def sizes_of(source: LayerSource) -> ModelSizes:
    linears: dict[str, LinearSize] = {}
    outline = source.outline()
    shares_norm = getattr(outline, "post_attention_layernorm", None) is None
    for name, module in outline.named_modules():
        if isinstance(module, nn.Linear):
            linears[name] = LinearSize(module.out_features, module.in_features, _reads(name, shares_norm=shares_norm))
    return ModelSizes(
        num_layers=source.num_layers,
        hidden=source.hidden_size,
        vocab=source.vocab_size,
        linears=linears,
        layer_bytes=max(source.layer_bytes(index) for index in range(source.num_layers)),
        end_bytes=source.end_bytes(),
        head_bytes=source.head_bytes,
        is_tied=source.is_tied,
        is_parallel=bool(getattr(outline, "is_parallel", False)),
    )


def _reads(name: str, *, shares_norm: bool) -> str:
    if name in (MIXED, WIDEST):
        return name
    return SHARED_INPUTS[0] if shares_norm or name.startswith("self_attn") else SHARED_INPUTS[1]
