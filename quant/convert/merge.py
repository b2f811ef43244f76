"""A peft LoRA adapter merged into its base model: W + scale * B @ A, tensor by tensor, from files to files.

`merge_adapter` writes a whole model directory; the maths is `merged_weight`. `quant.convert.lora` reads the adapter.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quant.convert.lora import Adapter, LowRank, read_adapter, refuse_not_finite
from quant.errors import CheckpointError
from quant.formats.autogptq import gptq_settings, locate_tensors, read_json
from quant.formats.checkpoint_names import CheckpointNames, checkpoint_names
from quant.formats.tensor_files import TensorFile, TensorToWrite, as_stored, write_tensors
from quant.model_directory import (
    Manifest,
    Parent,
    hash_directory,
    publish_directory,
    read_manifest,
    remove_leftovers_of,
    temporary_beside,
    write_manifest,
)
from quant.progress import ProgressSink

INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf"})
_MERGE_STAGE = "Merging the adapter"


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged model on disk. `parents`: the base and the adapter."""

    directory: Path
    parents: tuple[Parent, ...]


def merged_weight(weight: Tensor, update: LowRank) -> Tensor:
    """W + scale * B @ A, summed in float32 and rounded once to the weight's type.

    weight: (out, in), any floating type. Raises ValueError if the shapes differ.
    Source: arXiv:2106.09685, section 4.1. peft rounds B @ A to the adapter's type first.
    """
    if update.shape != tuple(weight.shape):
        raise ValueError(f"the update is {update.shape} and the weight {tuple(weight.shape)}")
    delta = update.up.to(torch.float32) @ update.down.to(torch.float32)
    return (weight.to(torch.float32) + delta * update.scale).to(weight.dtype)


def merge_adapter(base: Path, adapter: Path, out: Path, progress: ProgressSink) -> None:
    """Write `base` with `adapter` merged into it as the new directory `out`, which appears whole or not at all.

    The adapter and a run of rows of the base are in memory at a time. Raises CheckpointError for a base that is
    quantised, an adapter that is not plain LoRA or does not fit, and an `out` that holds something.
    """
    _refuse_unusable(base, out)
    update, merged = fit_adapter(base, adapter)
    with publish_directory(out) as directory:
        _copy_other_files(base, directory)
        for index, (name, tensors) in enumerate(merged.items()):
            progress.update(_MERGE_STAGE, index, len(merged))
            write_tensors(directory / name, tensors, {"format": "pt"})
        progress.update(_MERGE_STAGE, len(merged), len(merged))
        write_manifest(directory, _manifest(base, update))


def fit_adapter(base: Path, adapter: Path) -> tuple[Adapter, dict[str, list[TensorToWrite]]]:
    """The adapter, and each file of the merged model as it is to be written; of the base only headers are read.

    Raises CheckpointError as `merge_adapter` does.
    """
    names = checkpoint_names(read_json(base / CONFIG_FILE))
    update = read_adapter(adapter).renamed(names.standard)
    files = [TensorFile(path) for path in sorted(set(locate_tensors(base).values()))]
    names_of_base = {names.standard(name) for file in files for name in file.tensors}
    _refuse_strangers(update, names_of_base, base)
    _refuse_untying(update, names, names_of_base, base)
    merged = {file.path.name: [_merged(file, name, update, names) for name in file.tensors] for file in files}
    return update, merged


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
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        raise CheckpointError(
            f"the adapter {adapter.name} changes {strangers[0]}{more}, which {base} lacks{tied}; "
            "give the base that it was trained on"
        )


def _refuse_untying(adapter: Adapter, names: CheckpointNames, names_of_base: set[str], base: Path) -> None:
    """Embeddings trained beside a head that shares them belong to the embeddings alone; the base has one tensor."""
    changed = [name for name in adapter.names if names.ours(name)[0] == "model.embed_tokens.weight"]
    if changed and names.standard("lm_head.weight") not in names_of_base:
        raise CheckpointError(
            f"the adapter {adapter.name} has its own {changed[0]}, which {base} shares with its head; merge it with "
            "peft, which writes the two apart"
        )


def _merged(file: TensorFile, name: str, adapter: Adapter, names: CheckpointNames) -> TensorToWrite:
    """The tensor of the base as it is, or what the adapter makes of it when its turn comes. CheckpointError if the
    shapes differ. names: files may leave out a prefix that the adapter's names have."""
    update, replacement = adapter.updates.get(names.standard(name)), adapter.replacements.get(names.standard(name))
    if update is None and replacement is None:
        return as_stored(file, name)
    shape, dtype = file.tensors[name].shape, file.dtype(name)
    for part in (update, replacement):
        if part is not None and tuple(part.shape) != shape:
            raise CheckpointError(
                f"the adapter {adapter.name} does not fit {name}: it has {tuple(part.shape)}, the base {shape}"
            )

    def rows(first: int, last: int) -> Tensor:
        weight = file.rows(name, first, last) if replacement is None else replacement[first:last].to(dtype)
        if update is None:
            return weight
        merged = merged_weight(weight, update.rows(first, last))
        refuse_not_finite(Path(adapter.name), f"the merged {name}", merged)
        return merged

    return TensorToWrite(name, dtype, shape, rows)


def _copy_other_files(base: Path, directory: Path) -> None:
    """Not the weights in other formats that some repositories have beside these: they would be the base's still."""
    for path in base.iterdir():
        is_report = path.name.startswith("quantization_report")
        is_weights = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".bin.index.json")
        if path.is_file() and path.name != "causerie.json" and not is_weights and not is_report:
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
