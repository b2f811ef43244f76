"""Writes a GPTQ model directory in AutoGPTQ's layout: packed linears, everything else as the source has it.

Nothing is in memory for longer than it takes to copy: packed linears come from the files of single layers, the rest
from the source. Only float32 becomes float16: of a small model the embeddings would else be most of the file.
Tokenizer, chat template and generation settings are copied; `config.json` gains `quantization_config`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from quant.errors import CheckpointError
from quant.formats.autogptq import QUANTIZE_CONFIG_FILE, locate_tensors, pack_grids, read_json
from quant.formats.checkpoint_format import CheckpointFormat
from quant.formats.checkpoint_names import CheckpointNames, checkpoint_names
from quant.formats.tensor_files import TensorFile, TensorToWrite, as_stored, held, write_tensors
from quant.method.gptq import ActOrder, GptqOptions
from quant.method.matrix import QuantizedMatrix
from quant.method.packing import codes_per_word, pack_rows
from quant.options import LinearChoice

WEIGHTS_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
# As large as the hub's own files are by default.
SHARD_BYTES: Final = 5 * 10**9
# Of every family, on disk.
_HEADS: Final = frozenset({"lm_head", "embed_out"})
COPIED_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
)


def write_checkpoint(
    source: Path,
    target: Path,
    layers: Sequence[Path],
    choices: Mapping[str, LinearChoice],
    options: GptqOptions,
    *,
    checkpoint_format: CheckpointFormat = CheckpointFormat.V1,
    left_out: Collection[str] = (),
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Fill the existing directory `target`.

    layers:  safetensors files with the packed linears and tables, by their names on disk (`CheckpointNames`)
    choices: bits and group size of everything in them, by the same names
    options: with their group size settled
    checkpoint_format: the one that `layers` are packed in
    left_out: modules of the source, by the same names, that the result does not have
    Raises CheckpointError if the source has no weight for a linear, or values that float16 cannot hold.
    """
    config = read_json(source / "config.json")
    settings = quantization_config(choices, options, checkpoint_format)
    plain = _plain_tensors(source, choices, left_out, checkpoint_names(config))
    if any(tensor.dtype is torch.float32 for tensor in plain):
        plain = [_narrowed(tensor) for tensor in plain]
        config.update({key: "float16" for key in ("dtype", "torch_dtype") if config.get(key) == "float32"})
    packed = [as_stored(file, name) for file in map(TensorFile, layers) for name in file.tensors]
    _write_shards(target, [*plain, *packed], shard_bytes)
    _write_json(target / "config.json", {**config, "quantization_config": settings})
    _write_json(target / QUANTIZE_CONFIG_FILE, settings)
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def packed_as_written(
    name: str, matrix: QuantizedMatrix, checkpoint_format: CheckpointFormat = CheckpointFormat.V1
) -> list[TensorToWrite]:
    """The four tensors of linear `name`, as `pack_linear` makes them; codes are packed when their turn comes."""
    per_word = codes_per_word(matrix.bits)

    def words(first: int, last: int) -> Tensor:
        return pack_rows(matrix.codes[:, first * per_word : last * per_word].t(), matrix.bits)

    shape = (matrix.in_features // per_word, matrix.out_features)
    grids = pack_grids(matrix, checkpoint_format)
    return [
        TensorToWrite(f"{name}.qweight", torch.int32, shape, words),
        *(held(f"{name}.{part}", tensor) for part, tensor in grids.items()),
    ]


def quantization_config(
    choices: Mapping[str, LinearChoice],
    options: GptqOptions,
    checkpoint_format: CheckpointFormat = CheckpointFormat.V1,
) -> dict[str, object]:
    """Every field that other engines look at. `dynamic` names the linears that differ from the rest."""
    settings: dict[str, object] = {
        "quant_method": "gptq",
        "checkpoint_format": checkpoint_format.value,
        "bits": options.bits,
        "group_size": options.group_size,
        "sym": options.symmetric,
        # Static act-order keeps its groups in natural order, so the file is an ordinary one without reordering.
        "desc_act": options.act_order is ActOrder.SHUFFLED,
        "static_groups": options.act_order is ActOrder.STATIC,
        "damp_percent": options.damp,
        "true_sequential": True,
        "lm_head": not _HEADS.isdisjoint(choices),
        "pack_dtype": "int32",
        "meta": {"quantizer": ["causerie"]},
    }
    dynamic: dict[str, dict[str, int]] = {}
    for name, choice in choices.items():
        override: dict[str, int] = {}
        if choice.bits != options.bits:
            override["bits"] = choice.bits
        if choice.group_size is not None and choice.group_size != options.group_size:
            override["group_size"] = choice.group_size
        if override:
            dynamic[f"+:{re.escape(name)}$"] = override
    if dynamic:
        settings["dynamic"] = dynamic
    return settings


def _plain_tensors(
    source: Path, choices: Iterable[str], left_out: Collection[str], names: CheckpointNames
) -> list[TensorToWrite]:
    """Everything of the source that is not quantised, by the names to write it with. `choices` by names on disk."""
    file_of_tensor = locate_tensors(source)
    files = {path: TensorFile(path) for path in sorted(set(file_of_tensor.values()))}
    quantized = {f"{name}.weight" for name in choices}
    kept: list[TensorToWrite] = []
    for stored, path in file_of_tensor.items():
        name = names.standard(stored)
        if name in quantized:
            quantized.remove(name)
        elif not names.is_derived(stored) and name.removesuffix(".weight") not in left_out:
            kept.append(as_stored(files[path], stored, name))
    if quantized:
        raise CheckpointError(f"{source} has no weight for {min(quantized).removesuffix('.weight')}")
    return kept


def _narrowed(tensor: TensorToWrite) -> TensorToWrite:
    if tensor.dtype is not torch.float32:
        return tensor

    def rows(first: int, last: int) -> Tensor:
        narrow = tensor.rows(first, last).to(torch.float16)
        if not bool(narrow.isfinite().all()):
            raise CheckpointError(
                f"{tensor.name} has values that float16 cannot hold; convert the source to bfloat16 first"
            )
        return narrow

    return TensorToWrite(tensor.name, torch.float16, tensor.shape, rows)


def _write_shards(target: Path, tensors: Sequence[TensorToWrite], shard_bytes: int) -> None:
    """One file, or where that would be too large several and an index, as the hub names them."""
    shards: list[list[TensorToWrite]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    if len(shards) == 1:
        write_tensors(target / WEIGHTS_FILE, shards[0], {"format": "pt"})
        return
    file_of_tensor: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(target / name, shard, {"format": "pt"})
        file_of_tensor.update({tensor.name: name for tensor in shard})
    total = sum(tensor.num_bytes for tensor in tensors)
    _write_json(target / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": file_of_tensor})


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
