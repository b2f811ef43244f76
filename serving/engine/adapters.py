"""Low-rank adapters on live weights: every linear of the engine is base output + delta of each row's adapter.

An adapter is a set of LoRA pairs under the Hugging Face module names ("model.layers.0.self_attn.q_proj"), with the
scale already in B. Families that store queries, keys and values as one linear have one pair for it: the parts share its
A, and each has its own rows of B. Training swaps adapters between steps with `Engine.set_adapter`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from quant.errors import CheckpointError
from quant.formats.checkpoint_names import CheckpointNames


@dataclass(frozen=True, slots=True)
class LoraPair:
    """delta(x) = x @ a.T @ b.T; a: (rank, in), b: (out, rank)."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True, slots=True)
class Adapter:
    name: str
    version: int
    pairs: Mapping[str, LoraPair]  # by module name

    @classmethod
    def from_tensors(
        cls,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        version: int,
        dtype: torch.dtype,
        names: CheckpointNames,
    ) -> Adapter:
        """tensors: "<module>.lora_A.weight" (rank, in) and "<module>.lora_B.weight" (out, rank), scale in B. Copied.

        names: those of the checkpoint's modules; our own are understood, too.
        """
        modules = sorted({key.rsplit(".lora_", 1)[0] for key in tensors})
        pairs: dict[str, LoraPair] = {}
        for module in modules:
            missing = [end for end in ("A", "B") if f"{module}.lora_{end}.weight" not in tensors]
            if missing:
                raise CheckpointError(
                    f"adapter {name!r}: {module} has no lora_{missing[0]}.weight; a pair needs A and B"
                )
            a, b = (tensors[f"{module}.lora_{end}.weight"].detach().to("cpu", dtype, copy=True) for end in ("A", "B"))
            if a.shape[0] != b.shape[1]:
                raise CheckpointError(f"adapter {name!r}: {module} has rank {a.shape[0]} in A but {b.shape[1]} in B")
            try:
                pairs |= {ours: LoraPair(a, rows) for ours, rows in names.split_tensors({module: b}).items()}
            except CheckpointError as error:
                raise CheckpointError(f"adapter {name!r}: {module}: {error}") from error
        return cls(name, version, pairs)

    def check_fits(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """shapes: (outputs, inputs) of every linear of the model. CheckpointError names the first that does not fit."""
        for module, pair in self.pairs.items():
            if module not in shapes:
                raise CheckpointError(
                    f"adapter {self.name!r}: the model has no linear {module!r}; its linears are named like "
                    f"{next(iter(shapes))!r}"
                )
            found = (pair.b.shape[0], pair.a.shape[1])
            if found != shapes[module]:
                raise CheckpointError(f"adapter {self.name!r}: {module} is {found}; the model's is {shapes[module]}")


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """The rows of a step's batch that use one adapter."""

    adapter: Adapter
    rows: torch.Tensor  # (rows,) int64


def add_deltas(
    output: torch.Tensor, x: torch.Tensor, parts: Sequence[tuple[str, int]], groups: Sequence[AdapterRows]
) -> None:
    """Add each row's delta in place.

    output: (rows, out) of a fused linear; x: (rows, in) its input; parts: (module name, width) in order of columns.
    """
    for group in groups:
        start = 0
        for module, width in parts:
            pair = group.adapter.pairs.get(module)
            if pair is not None:
                rows = x.index_select(0, group.rows).to(pair.a.dtype)
                delta = (rows @ pair.a.T) @ pair.b.T
                output[:, start : start + width].index_add_(0, group.rows, delta.to(output.dtype))
            start += width
