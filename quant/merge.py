"""A peft LoRA adapter merged into its base model: W + scale * B @ A, tensor by tensor, from files to files.

`merge_adapter` writes a whole model directory; the maths is `merged_weight`. Reading the adapter is up to `quant.lora`.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from quant.errors import CheckpointError
from quant.formats.autogptq import gptq_settings
from quant.lora import Adapter, LowRank, open_safetensors, read_adapter, refuse_not_finite
from quant.model_directory import (
    Manifest,
    Parent,
    hash_directory,
    publish_directory,
    read_manifest,
    write_manifest,
)
from quant.progress import ProgressSink

INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
_MERGE_STAGE = "Merging the adapter"


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged model on disk. `parents`: the base and the adapter."""

    directory: Path
    parents: tuple[Parent, ...]


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

    The adapter and one shard of the base are in memory at a time. Raises CheckpointError for a base that is quantised,
    an adapter that is not plain LoRA or does not fit, and an `out` that holds something.
    """
    _refuse_unusable(base, out)
    update = read_adapter(adapter)
    shards = _tensors_by_file(base)
    names_of_base = {name for names in shards.values() for name in names}
    _refuse_strangers(update, names_of_base, base)
    _refuse_untying(update, names_of_base, base)
    with publish_directory(out) as directory:
        _copy_other_files(base, directory)
        for index, (file, names) in enumerate(sorted(shards.items())):
            progress.update(_MERGE_STAGE, index, len(shards))
            _merge_file(base / file, names, update, directory / file)
        progress.update(_MERGE_STAGE, len(shards), len(shards))
        write_manifest(directory, _manifest(base, update))


@contextlib.contextmanager
def merged_for_a_while(base: Path, adapter: Path, beside: Path, progress: ProgressSink) -> Generator[Merged]:
    """The merged model in a temporary directory next to `beside`, on whose disk there must be room for it.

    Raises as `merge_adapter` does.
    """
    parent = beside.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{beside.name}.merged-", dir=parent) as folder:
        directory = Path(folder) / f"{base.name}+{adapter.name}"
        merge_adapter(base, adapter, directory, progress)
        manifest = read_manifest(directory)
        assert manifest is not None
        yield Merged(directory, manifest.parents)


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
    tensors: dict[str, Tensor] = {}
    with open_safetensors(source) as file:
        for name in names:
            tensors[name] = _merged(name, file.get_tensor(name), adapter)
    save_file(tensors, target, metadata={"format": "pt"})


def _merged(name: str, weight: Tensor, adapter: Adapter) -> Tensor:
    """`weight` itself where the adapter does not change it. CheckpointError if the shapes differ."""
    replacement = adapter.replacements.get(name)
    if replacement is not None:
        if replacement.shape != weight.shape:
            found, wanted = tuple(replacement.shape), tuple(weight.shape)
            raise CheckpointError(f"the adapter {adapter.name} has {name} as {found}; the base has it as {wanted}")
        weight = replacement.to(weight.dtype)
    update = adapter.updates.get(name)
    if update is None:
        return weight
    try:
        merged = merged_weight(weight, update, fan_in_fan_out=adapter.fan_in_fan_out)
    except ValueError as error:
        raise CheckpointError(f"the adapter {adapter.name} does not fit {name}: {error}") from error
    refuse_not_finite(Path(adapter.name), f"the merged {name}", merged)
    return merged.contiguous()


def _tensors_by_file(base: Path) -> dict[str, list[str]]:
    """The names that each weight file of the base holds."""
    files = sorted(base.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{base} has no safetensors files; weights of other kinds are not read")
    found: dict[str, list[str]] = {}
    for path in files:
        with open_safetensors(path) as file:
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
