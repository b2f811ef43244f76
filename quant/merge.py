"""A peft LoRA adapter merged into its base model: W + scale * B @ A, tensor by tensor, from files to files.

Reads `adapter_config.json` and `adapter_model.safetensors` itself, without peft; what it cannot merge exactly as peft
would is refused by name. `merge_adapter` writes a whole model directory; the maths is `merged_weight`.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quant.errors import CheckpointError
from quant.formats.autogptq import gptq_settings
from quant.formats.tensor_files import TensorFile, TensorToWrite, write_tensors
from quant.model_directory import (
    Manifest,
    Parent,
    hash_directory,
    hash_file,
    publish_directory,
    read_manifest,
    remove_leftovers_of,
    temporary_beside,
    write_manifest,
)
from quant.progress import ProgressSink

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
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
_MERGE_STAGE = "Merging the adapter"


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
class Merged:
    """A merged model on disk. `parents`: the base and the adapter."""

    directory: Path
    parents: tuple[Parent, ...]


@dataclass(frozen=True, slots=True)
class LowRank:
    """An update of one weight: `down` (rank, in) is peft's A, `up` (out, rank) its B."""

    down: Tensor
    up: Tensor
    scale: float

    def shape(self, *, fan_in_fan_out: bool) -> tuple[int, int]:
        """Of the weight that it updates: (out, in), or (in, out) with fan_in_fan_out."""
        outputs, inputs = self.up.shape[0], self.down.shape[1]
        return (inputs, outputs) if fan_in_fan_out else (outputs, inputs)

    def rows(self, first: int, last: int, *, fan_in_fan_out: bool) -> LowRank:
        """The update of these rows of that weight."""
        if fan_in_fan_out:
            return replace(self, down=self.down[:, first:last])
        return replace(self, up=self.up[first:last])


@dataclass(frozen=True, slots=True)
class Adapter:
    """Everything by the name of the base model's tensor: low-rank updates, and tensors that take its place whole."""

    name: str
    sha256: str
    updates: Mapping[str, LowRank]
    replacements: Mapping[str, Tensor]
    fan_in_fan_out: bool = False

    @property
    def names(self) -> set[str]:
        return {*self.updates, *self.replacements}


def merged_weight(weight: Tensor, update: LowRank, *, fan_in_fan_out: bool = False) -> Tensor:
    """W + scale * B @ A, summed in float32 and rounded once to the weight's type.

    weight: (out, in), or (in, out) with fan_in_fan_out; any floating type. Raises ValueError if the shapes differ.
    Source: arXiv:2106.09685, section 4.1. peft rounds B @ A to the adapter's type first.
    """
    delta = update.up.to(torch.float32) @ update.down.to(torch.float32)
    if fan_in_fan_out:
        delta = delta.t()
    if delta.shape != weight.shape:
        raise ValueError(f"the update is {tuple(delta.shape)} and the weight {tuple(weight.shape)}")
    return (weight.to(torch.float32) + delta * update.scale).to(weight.dtype)


def merge_adapter(base: Path, adapter: Path, out: Path, progress: ProgressSink) -> None:
    """Write `base` with `adapter` merged into it as the new directory `out`, which appears whole or not at all.

    The adapter and some rows of one tensor of the base are in memory at a time. Raises CheckpointError for a base that
    is quantised, an adapter that is not plain LoRA or does not fit, and an `out` that holds something.
    """
    _refuse_unusable(base, out)
    update = check_adapter(base, adapter)
    shards = _tensors_by_file(base)
    with publish_directory(out) as directory:
        _copy_other_files(base, directory)
        for index, (file, names) in enumerate(sorted(shards.items())):
            progress.update(_MERGE_STAGE, index, len(shards))
            _merge_file(base / file, names, update, directory / file)
        progress.update(_MERGE_STAGE, len(shards), len(shards))
        write_manifest(directory, _manifest(base, update))


def check_adapter(base: Path, adapter: Path) -> Adapter:
    """The adapter, if it is one that fits this base by its names. Raises CheckpointError as `merge_adapter` does."""
    update = read_adapter(adapter)
    names_of_base = {name for names in _tensors_by_file(base).values() for name in names}
    _refuse_strangers(update, names_of_base, base)
    _refuse_untying(update, names_of_base, base)
    return update


@contextlib.contextmanager
def merged_for_a_while(base: Path, adapter: Path, beside: Path, progress: ProgressSink) -> Generator[Merged]:
    """The merged model in a temporary directory next to `beside`, on whose disk there must be room for it.

    Raises as `merge_adapter` does.
    """
    remove_leftovers_of(beside)
    folder = temporary_beside(beside)
    folder.mkdir(parents=True)
    try:
        directory = folder / f"{base.name}+{adapter.name}"
        merge_adapter(base, adapter, directory, progress)
        manifest = read_manifest(directory)
        assert manifest is not None
        yield Merged(directory, manifest.parents)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    for name, tensor in _read_all(path).items():
        _refuse_not_finite(path, name, tensor)
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
    return Adapter(directory.absolute().name, hash_file(path), updates, replacements, config.fan_in_fan_out)


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
    return LowRank(down, up, config.scale_of(module))


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


def _refuse_unusable(base: Path, out: Path) -> None:
    if not (base / CONFIG_FILE).is_file():
        raise CheckpointError(f"{base} is not a model directory: it has no {CONFIG_FILE}")
    if gptq_settings(base) is not None:
        raise CheckpointError(f"{base} is quantised; merge into the source weights, and quantise the result")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty; give the name of a new directory")


def _refuse_strangers(adapter: Adapter, names: set[str], base: Path) -> None:
    """An update without a weight to go to would be lost in silence."""
    strangers = sorted(adapter.names - names)
    if strangers:
        tied = " (the base shares its head with the embeddings)" if "lm_head.weight" in strangers else ""
        raise CheckpointError(
            f"the adapter {adapter.name} changes {len(strangers)} tensors that {base} lacks, such as "
            f"{strangers[0]}{tied}; give the base that it was trained on"
        )


def _refuse_untying(adapter: Adapter, names: set[str], base: Path) -> None:
    """Embeddings trained beside a head that shares them belong to the embeddings alone; the base has one tensor."""
    changed = [name for name in adapter.names if name.endswith("embed_tokens.weight")]
    if changed and "lm_head.weight" not in names:
        raise CheckpointError(
            f"the adapter {adapter.name} has its own {changed[0]}, which {base} shares with its head; merge it with "
            "peft, which writes the two apart"
        )


def _merge_file(source: Path, names: Sequence[str], adapter: Adapter, target: Path) -> None:
    file = TensorFile(source)
    write_tensors(target, [_to_write(file, name, adapter) for name in names], {"format": "pt"})


def _to_write(file: TensorFile, name: str, adapter: Adapter) -> TensorToWrite:
    """As it is stored where the adapter does not change it. CheckpointError if the shapes differ."""
    shape, replacement, update = file.tensors[name].shape, adapter.replacements.get(name), adapter.updates.get(name)
    if replacement is not None and tuple(replacement.shape) != tuple(shape):
        found, wanted = tuple(replacement.shape), tuple(shape)
        raise CheckpointError(f"the adapter {adapter.name} has {name} as {found}; the base has it as {wanted}")
    if update is not None and update.shape(fan_in_fan_out=adapter.fan_in_fan_out) != tuple(shape):
        found = update.shape(fan_in_fan_out=adapter.fan_in_fan_out)
        raise CheckpointError(
            f"the adapter {adapter.name} does not fit {name}: the update is {found} and the weight {tuple(shape)}"
        )

    def rows(first: int, last: int) -> Tensor:
        weight = file.rows(name, first, last) if replacement is None else replacement[first:last].to(file.dtype(name))
        if update is None:
            return weight
        part = update.rows(first, last, fan_in_fan_out=adapter.fan_in_fan_out)
        merged = merged_weight(weight, part, fan_in_fan_out=adapter.fan_in_fan_out)
        _refuse_not_finite(Path(adapter.name), f"the merged {name}", merged)
        return merged

    return TensorToWrite(name, file.dtype(name), tuple(shape), rows)


def _tensors_by_file(base: Path) -> dict[str, list[str]]:
    """The names that each weight file of the base holds."""
    files = sorted(base.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{base} has no safetensors files; weights of other kinds are not read")
    found: dict[str, list[str]] = {}
    for path in files:
        with _open(path) as file:
            found[path.name] = list(file.keys())
    return found


def _copy_other_files(base: Path, directory: Path) -> None:
    for path in base.iterdir():
        is_report = path.name.startswith("quantization_report")
        if path.is_file() and path.suffix != ".safetensors" and path.name != "causerie.json" and not is_report:
            shutil.copyfile(path, directory / path.name)


def _manifest(base: Path, adapter: Adapter) -> Manifest:
    before = read_manifest(base)
    name = before.config.get("name") if before is not None else None
    return Manifest(
        stage="merge",
        parents=(
            Parent(name if isinstance(name, str) else base.absolute().name, hash_directory(base)),
            Parent(adapter.name, adapter.sha256),
        ),
        config={"method": "lora", "merged_tensors": len(adapter.names)},
        chat_format_sha256=None if before is None else before.chat_format_sha256,
    )


def _read_all(path: Path) -> dict[str, Tensor]:
    with _open(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the handle is not iterable


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def _refuse_not_finite(origin: Path, name: str, tensor: Tensor) -> None:
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
