"""A peft LoRA adapter as it lies on disk: `adapter_config.json` and `adapter_model.safetensors`, read without peft.

What is not plain LoRA is refused by its name. What becomes of the updates is up to callers: `quant.convert.merge`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from quant.errors import CheckpointError
from quant.formats.tensor_files import TensorFile
from quant.model_directory import hash_file

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Options that change what a low-rank update means, and what each is called; all of them off is plain LoRA.
_REFUSED_OPTIONS = {
    "use_dora": "DoRA, which also scales each row",
    "use_qalora": "QALoRA, which pools its inputs",
    "lora_bias": "LoRA with biases of its own",
    "layer_replication": "an adapter that repeats layers",
    "target_parameters": "LoRA on single parameters",
    "trainable_token_indices": "an adapter with retrained tokens",
    "arrow_config": "routing between adapters (Arrow)",
    "alora_invocation_tokens": "activated LoRA, which only works unmerged",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
# These change the base's weights before training starts, so that the adapter only fits the changed ones.
_REFUSED_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What `adapter_config.json` says that merging needs. The patterns give single modules another rank or alpha."""

    rank: int
    alpha: float
    is_rank_stabilised: bool
    fan_in_fan_out: bool
    rank_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])

    def scale_of(self, module: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) where rank-stabilised (arXiv:2312.03732). module: its full name."""
        rank = _of_pattern(self.rank_pattern, module, self.rank)
        alpha = _of_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (rank**0.5 if self.is_rank_stabilised else rank)


@dataclass(frozen=True, slots=True)
class LowRank:
    """An update of one weight: `down` (rank, in) is peft's A, `up` (out, rank) its B."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), as the weight has it."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def transposed(self) -> LowRank:
        """The update of the transposed weight."""
        return LowRank(self.up.t(), self.down.t(), self.scale)

    def rows(self, first: int, last: int) -> LowRank:
        """The update of rows `first` up to, not including, `last` of the weight."""
        return LowRank(self.down, self.up[first:last], self.scale)


@dataclass(frozen=True, slots=True)
class Adapter:
    """Everything by the name of the base model's tensor: low-rank updates, and tensors that take its place whole."""

    name: str
    sha256: str
    updates: Mapping[str, LowRank]
    replacements: Mapping[str, Tensor]

    @property
    def names(self) -> set[str]:
        return {*self.updates, *self.replacements}

    def renamed(self, rename: Callable[[str], str]) -> Adapter:
        updates = {rename(name): update for name, update in self.updates.items()}
        replacements = {rename(name): tensor for name, tensor in self.replacements.items()}
        return replace(self, updates=updates, replacements=replacements)


def read_adapter(directory: Path) -> Adapter:
    """Raises CheckpointError for what is no LoRA adapter in safetensors, naming the method or file that it found."""
    config = read_lora_config(directory)
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file():
        pickled = [file.name for file in directory.glob("adapter_model.*") if file.suffix in (".bin", ".pt")]
        hint = f"; {pickled[0]} is pickled, which is never read: save the adapter as safetensors" if pickled else ""
        raise CheckpointError(f"{directory} has no {ADAPTER_WEIGHTS}{hint}")
    low_rank: dict[str, dict[str, Tensor]] = {}
    replacements: dict[str, Tensor] = {}
    file = TensorFile(path)
    for name in file.tensors:
        tensor = file.read(name)
        refuse_not_finite(path, name, tensor)
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])(?:\.\w+)?\.weight", name)
        if found is not None:
            low_rank.setdefault(found[1], {})[found[2]] = tensor
        elif name.startswith(PREFIX) and ".lora_" not in name:
            replacements[name.removeprefix(PREFIX).replace(".modules_to_save.default.", ".")] = tensor
        else:
            kind = "LoRA on embeddings" if "lora_embedding" in name else "no low-rank update of a linear"
            raise CheckpointError(f"{path}: {name} is {kind}, which cannot be merged; train the adapter without it")
    updates = {f"{module}.weight": _low_rank(path, module, parts, config) for module, parts in low_rank.items()}
    if not updates and not replacements:
        raise CheckpointError(f"{path} holds no tensors")
    return Adapter(directory.absolute().name, hash_file(path), updates, replacements)


def read_lora_config(directory: Path) -> LoraConfig:
    """Raises CheckpointError for a file that is absent or broken, and for a method that is not plain LoRA."""
    path = directory / ADAPTER_CONFIG
    if not path.is_file():
        raise CheckpointError(f"{directory} is not a peft adapter: it has no {ADAPTER_CONFIG}")
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} holds a JSON {type(parsed).__name__}; expected an object")
    record = cast("Mapping[str, object]", parsed)
    if record.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} is of the kind {record.get('peft_type')!r}; only LORA can be merged")
    for option, what in _REFUSED_OPTIONS.items():
        if record.get(option):
            raise CheckpointError(f"{path}: {option} is set: {what}; only plain LoRA can be merged. Merge it with peft")
    start = record.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_REFUSED_STARTS):
        raise CheckpointError(
            f"{path}: init_lora_weights is {start!r}, which changes the base's weights too; merge it with peft"
        )
    if record.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias is {record['bias']!r}; only adapters with bias = 'none' can be merged")
    return LoraConfig(
        rank=int(_positive(record, "r", path)),
        alpha=_positive(record, "lora_alpha", path),
        is_rank_stabilised=bool(record.get("use_rslora")),
        fan_in_fan_out=bool(record.get("fan_in_fan_out")),
        rank_pattern=_pattern(record, "rank_pattern", path),
        alpha_pattern=_pattern(record, "alpha_pattern", path),
    )


def _low_rank(path: Path, module: str, parts: Mapping[str, Tensor], config: LoraConfig) -> LowRank:
    if set(parts) != {"A", "B"}:
        missing = "B" if "A" in parts else "A"
        raise CheckpointError(f"{path}: {module} has no lora_{missing}; the file is not complete")
    down, up = parts["A"], parts["B"]
    rank = int(_of_pattern(config.rank_pattern, module, config.rank))
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != rank or up.shape[1] != rank:
        raise CheckpointError(
            f"{path}: {module} has A {tuple(down.shape)} and B {tuple(up.shape)}; rank {rank} makes them "
            f"({rank}, inputs) and (outputs, {rank})"
        )
    update = LowRank(down, up, config.scale_of(module))
    return update.transposed if config.fan_in_fan_out else update


def _of_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """peft's rule: the first key that is the end of the module's name, as a regular expression after a dot."""
    for key, value in pattern.items():
        try:
            found = re.match(rf"(.*\.)?({key})$", module)
        except re.error as error:
            raise CheckpointError(f"{ADAPTER_CONFIG}: {key!r} is not a pattern of module names: {error}") from error
        if found is not None:
            return value
    return default


def refuse_not_finite(origin: Path, name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{origin}: {name} holds values that are not finite; the training has diverged")


def _positive(record: Mapping[str, object], key: str, path: Path) -> float:
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise CheckpointError(f"{path}: {key} is {value!r}, expected a positive number")
    return float(value)


def _pattern(record: Mapping[str, object], key: str, path: Path) -> dict[str, float]:
    pattern = record.get(key) or {}
    if not isinstance(pattern, dict):
        raise CheckpointError(f"{path}: {key} is {type(pattern).__name__}, expected an object")
    named = cast("Mapping[str, object]", pattern)
    return {name: _positive(named, name, path) for name in named}
