"""How checkpoints of other families name and lay out what our decoder calls as Llama does, and back.

BLOOM and GPT-NeoX store queries, keys and values as one linear, its rows ordered by head, then q, k, v, then dimension.
Splitting and fusing only moves rows, so it is exact for plain weights and for quantised ones, whose grids run along
inputs. Pure: whoever reads or writes files asks here for names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from quant.errors import CheckpointError
from quant.method.matrix import QuantizedMatrix, have_equal_groups

T = TypeVar("T")

_QKV = tuple(f"model.layers.{{}}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))
_PARTS_OF_LINEAR = frozenset({"weight", "bias", "qweight", "qzeros", "scales", "g_idx"})
_LAYER_INDEX = re.compile(r"\.(\d+)\.")
# Old checkpoints store the rotary frequencies; they follow from the config.
_DERIVED_EVERYWHERE = ("rotary_emb.inv_freq",)


@dataclass(frozen=True, slots=True)
class StoredName:
    """`part` is 0, 1 or 2 for the queries, keys or values of a fused linear; None for a whole one."""

    name: str
    part: int | None


@dataclass(frozen=True, slots=True)
class CheckpointNames:
    """One checkpoint's names. Without `modules` they are ours, nothing is fused and every method changes nothing.

    modules:  names of modules on disk -> ours, "{}" for a layer's index; three of ours where they are fused
    head_dim: of the fused linears
    prefix:   what some files leave out before every name
    derived:  ends of names of stored tensors that hold nothing of their own
    """

    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    head_dim: int = 1
    prefix: str = ""
    derived: tuple[str, ...] = _DERIVED_EVERYWHERE

    @property
    def fused(self) -> Mapping[str, tuple[str, ...]]:
        """The modules on disk that hold several of ours: both names with "{}" for the layer's index."""
        return {stored: ours for stored, ours in self.modules.items() if len(ours) > 1}

    def is_derived(self, stored: str) -> bool:
        return stored.endswith(self.derived)

    def ours(self, stored: str) -> tuple[str, ...]:
        """What a module or tensor on disk is called in our decoder; three names for a fused one.

        A name that the family does not have is returned as it is.
        """
        template, layer, end = _parse(stored)
        found = self.modules.get(template) or self.modules.get(self.prefix + template)
        return (stored,) if found is None else tuple(name.format(layer) + end for name in found)

    def stored(self, ours: str) -> StoredName:
        """Where a module or tensor of our decoder stands on disk, under the name to write it with."""
        template, layer, end = _parse(ours)
        for theirs, names in self.modules.items():
            if template in names:
                part = names.index(template) if len(names) > 1 else None
                return StoredName(theirs.format(layer) + end, part)
        return StoredName(ours, None)

    def standard(self, stored: str) -> str:
        """The name to write a tensor with that was read as `stored`: with the prefix, in the current spelling."""
        return self.stored(self.ours(stored)[0]).name

    def take_part(self, fused: Tensor, part: int) -> Tensor:
        """The rows of one of q, k, v, in our order. fused: (heads * 3 * head_dim, ...) -> (heads * head_dim, ...)."""
        if fused.shape[0] % (3 * self.head_dim):
            raise CheckpointError(
                f"a fused linear has {fused.shape[0]} rows; a multiple of 3 x {self.head_dim} was expected"
            )
        return fused.unflatten(0, (-1, 3, self.head_dim))[:, part].flatten(0, 1)

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `take_part`: q, k, v, (heads * head_dim, ...) each -> (heads * 3 * head_dim, ...)."""
        return torch.stack([part.unflatten(0, (-1, self.head_dim)) for part in parts], dim=1).flatten(0, 2)

    def split_matrix(self, stored: str, matrix: QuantizedMatrix) -> list[tuple[str, QuantizedMatrix]]:
        """A quantised linear on disk as the linears of our decoder, with their names."""
        names = self.ours(stored)
        if len(names) == 1:
            return [(names[0], matrix)]
        return [
            (name, _map_rows([matrix], lambda parts, index=index: self.take_part(parts[0], index)))
            for index, name in enumerate(names)
        ]

    def fuse_matrices(self, matrices: Mapping[str, QuantizedMatrix]) -> dict[str, QuantizedMatrix]:
        """Quantised linears of our decoder as they stand on disk.

        Raises CheckpointError if q, k and v of one fused linear are not all there or do not share their grid.
        """
        return {
            stored: members[0] if len(members) == 1 else self._fuse_grid(stored, members)
            for stored, members in self._members(matrices).items()
        }

    def split_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Plain tensors as they stand on disk -> those of our decoder, without what is derived."""
        split: dict[str, Tensor] = {}
        for stored, tensor in tensors.items():
            ours = () if self.is_derived(stored) else self.ours(stored)
            for part, name in enumerate(ours):
                split[name] = tensor if len(ours) == 1 else self.take_part(tensor, part)
        return split

    def fuse_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Plain tensors of our decoder as they stand on disk. Raises CheckpointError if q, k or v is missing."""
        return {
            stored: members[0] if len(members) == 1 else self.fuse(members)
            for stored, members in self._members(tensors).items()
        }

    def _members(self, values: Mapping[str, T]) -> dict[str, list[T]]:
        """By name on disk: the value of a whole module, or those of q, k and v in this order."""
        members: dict[str, list[T]] = {}
        for name in values:
            stored = self.stored(name).name
            if stored not in members:
                wanted = self.ours(stored)
                missing = [other for other in wanted if other not in values]
                if missing and len(wanted) > 1:
                    raise CheckpointError(f"{stored} joins q, k and v; {', '.join(missing)} is missing")
                members[stored] = [values[other] for other in wanted] if len(wanted) > 1 else [values[name]]
        return members

    def _fuse_grid(self, stored: str, parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
        if not have_equal_groups(parts):
            grids = sorted({(part.bits, part.group_size) for part in parts})
            found = " and ".join(f"{bits} bits in groups of {size}" for bits, size in grids)
            raise CheckpointError(
                f"{stored} joins q, k and v in one linear, which has one grid; they are quantised to {found}. "
                "Give q_proj, k_proj and v_proj of a layer the same bits, group size and order of inputs"
            )
        return _map_rows(parts, self.fuse)


def checkpoint_names(config: Mapping[str, object]) -> CheckpointNames:
    """Of config.json's content. Architectures named as Llama, and unknown ones, get names that change nothing."""
    architectures = config.get("architectures")
    names = (
        {str(name) for name in cast("list[object]", architectures)} if isinstance(architectures, list) else set[str]()
    )
    family = next((_FAMILIES[name] for name in _FAMILIES if name in names), None)
    if family is None:
        return CheckpointNames()
    hidden, heads = (_first_count(config, *keys) for keys in (("hidden_size", "n_embed"), _HEADS_KEYS))
    return replace(family, head_dim=max(1, hidden // heads))


_HEADS_KEYS = ("n_head", "num_attention_heads")
_LAYER = "model.layers.{}."
_BLOOM = CheckpointNames(
    modules={
        "transformer.word_embeddings": ("model.embed_tokens",),
        "transformer.word_embeddings_layernorm": ("model.embed_norm",),
        "transformer.h.{}.input_layernorm": (_LAYER + "input_layernorm",),
        "transformer.h.{}.self_attention.query_key_value": _QKV,
        "transformer.h.{}.self_attention.dense": (_LAYER + "self_attn.o_proj",),
        "transformer.h.{}.post_attention_layernorm": (_LAYER + "post_attention_layernorm",),
        "transformer.h.{}.mlp.dense_h_to_4h": (_LAYER + "mlp.up_proj",),
        "transformer.h.{}.mlp.dense_4h_to_h": (_LAYER + "mlp.down_proj",),
        "transformer.ln_f": ("model.norm",),
    },
    prefix="transformer.",
)
_GPT_NEOX = CheckpointNames(
    modules={
        "gpt_neox.embed_in": ("model.embed_tokens",),
        "gpt_neox.layers.{}.input_layernorm": (_LAYER + "input_layernorm",),
        "gpt_neox.layers.{}.attention.query_key_value": _QKV,
        "gpt_neox.layers.{}.attention.dense": (_LAYER + "self_attn.o_proj",),
        "gpt_neox.layers.{}.post_attention_layernorm": (_LAYER + "post_attention_layernorm",),
        "gpt_neox.layers.{}.mlp.dense_h_to_4h": (_LAYER + "mlp.up_proj",),
        "gpt_neox.layers.{}.mlp.dense_4h_to_h": (_LAYER + "mlp.down_proj",),
        "gpt_neox.final_layer_norm": ("model.norm",),
        # Newer code calls the head lm_head and still writes the older name, which all readers know.
        "embed_out": ("lm_head",),
    },
    prefix="gpt_neox.",
    derived=(*_DERIVED_EVERYWHERE, ".attention.bias", ".attention.masked_bias"),
)
_FAMILIES: Mapping[str, CheckpointNames] = {"BloomForCausalLM": _BLOOM, "GPTNeoXForCausalLM": _GPT_NEOX}


def _parse(name: str) -> tuple[str, str, str]:
    """Template with "{}" for the layer's index, that index, and what follows the module's name, such as ".weight"."""
    module, _, end = name.rpartition(".")
    if end not in _PARTS_OF_LINEAR:
        module, end = name, ""
    # A dot in front, so that an index at the very start of an unprefixed name counts as well.
    index = _LAYER_INDEX.search(f".{module}.")
    template = _LAYER_INDEX.sub(".{}.", f".{module}.", count=1)[1:-1]
    return template, index.group(1) if index else "", f".{end}" if end else ""


def _map_rows(matrices: Sequence[QuantizedMatrix], arrange: Callable[[Sequence[Tensor]], Tensor]) -> QuantizedMatrix:
    """One matrix from the rows of others that share their grid's form."""
    return replace(
        matrices[0],
        codes=arrange([matrix.codes for matrix in matrices]),
        scales=arrange([matrix.scales for matrix in matrices]),
        zeros=arrange([matrix.zeros for matrix in matrices]),
    )


def _first_count(config: Mapping[str, object], *keys: str) -> int:
    values: Iterable[object] = (config.get(key) for key in keys)
    found = next((value for value in values if value is not None), None)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise CheckpointError(f"config.json: {' or '.join(keys)} must be a positive whole number; found {found!r}")
    return found
