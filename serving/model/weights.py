"""Model directory -> `Decoder`, and back. Only safetensors are read, one tensor at a time through a memory map.

Plain and GPTQ checkpoints load through the same function: packed linears become `QuantizedLinear` under the name that
the plain one would have, and packed embeddings plain numbers. Tensors that are missing, unexpected or of another shape
are errors that name them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quant.errors import CheckpointError
from quant.formats.autogptq import (
    gptq_settings,
    is_packed_tensor,
    iterate_quantized_linears,
)
from quant.formats.checkpoint_names import CheckpointNames, checkpoint_names
from quant.formats.pickled import pickled_hint
from quant.formats.safetensors_header import check_safetensors
from quant.int4_linear import QuantizedLinear
from quant.method.matrix import QuantizedMatrix, take_outputs
from serving.model.json_files import read_object
from serving.model.spec import DecoderSpec, spec_from_config
from serving.model.transformer import Decoder

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LAYER_PREFIX = "model.layers."
_NAMES_SHOWN = 8
_TABLE_RUN_ROWS = 8192


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one of the decoder's tensors lies. `part`: 0, 1, 2 for the queries, keys, values of a fused one."""

    file: Path
    stored: str
    part: int | None


def read_config(directory: Path) -> dict[str, object]:
    """config.json's content. CheckpointError if it is absent or not an object."""
    return read_object(directory / CONFIG_FILE)


def load_spec(directory: Path) -> DecoderSpec:
    return spec_from_config(read_config(directory))


def load_decoder(directory: Path, *, dtype: torch.dtype = torch.float32, with_layers: bool = True) -> Decoder:
    """Build the decoder of a model directory on the CPU, plain parameters in `dtype`.

    Tensors already stored in `dtype` stay memory-mapped (private: writing to them does not change the file).
    with_layers: False leaves `decoder.layers` empty; its spec still counts them
    """
    decoder = Decoder(load_spec(directory), dtype=dtype, device="meta")
    file_of_tensor = locate_tensors(directory)
    if not with_layers:
        decoder.model.layers = nn.ModuleList()
        file_of_tensor = _without_layers(file_of_tensor, checkpoint_names(read_config(directory)))
    # Without GPTQ settings nothing is packed, and tensors of such names are unexpected ones.
    is_quantized = gptq_settings(directory) is not None
    if is_quantized:
        _insert_quantized(decoder, directory, with_layers=with_layers)
        file_of_tensor = {name: file for name, file in file_of_tensor.items() if not is_packed_tensor(name)}
    names = checkpoint_names(read_config(directory))
    places = _places(file_of_tensor, names)
    # What was packed is there already; its plain form beside it would be one too many.
    expected = {name: tensor for name, tensor in decoder.state_dict().items() if tensor.is_meta}
    unexpected = _unexpected_names(places, expected, tied=decoder.spec.tied_embeddings)
    if is_quantized:
        unexpected = [name for name in unexpected if not _is_zero_bias(name, places[name])]
    _refuse_names("has tensors that the model lacks", [places[name].stored for name in unexpected], directory)
    missing = [names.stored(name).name for name in expected if name not in places]
    _refuse_names("lacks tensors", list(dict.fromkeys(missing)), directory)
    for file in sorted({places[name].file for name in expected}):
        wanted = {name: places[name] for name in expected if places[name].file == file}
        decoder.load_state_dict(_read_tensors(file, wanted, names, expected, dtype), strict=False, assign=True)
    return decoder.eval()


def _without_layers(file_of_tensor: Mapping[str, Path], names: CheckpointNames) -> dict[str, Path]:
    return {
        stored: file
        for stored, file in file_of_tensor.items()
        if not names.is_derived(stored) and not names.ours(stored)[0].startswith(LAYER_PREFIX)
    }


def decoder_from_tensors(config: Mapping[str, object], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Decoder:
    """A decoder over weights that are already in memory, such as a model in training; no file is read.

    config:  config.json's content
    tensors: plain weights by their Hugging Face names; those in `dtype` on the CPU are shared, not copied
    Raises CheckpointError for tensors that are missing, unexpected or of another shape.
    """
    decoder = Decoder(spec_from_config(config), dtype=dtype, device="meta")
    expected = dict(decoder.state_dict())
    tensors = checkpoint_names(config).split_tensors(tensors)
    unexpected = _unexpected_names(tensors, expected, tied=decoder.spec.tied_embeddings)
    _refuse_names("have names that the model lacks", unexpected, "these weights")
    _refuse_names("lack tensors", [name for name in expected if name not in tensors], "these weights")
    taken: dict[str, Tensor] = {}
    for name, wanted in expected.items():
        if tensors[name].shape != wanted.shape:
            found = tuple(tensors[name].shape)
            raise CheckpointError(f"{name} is {found}; the configuration makes it {tuple(wanted.shape)}")
        taken[name] = tensors[name].detach().to("cpu", dtype)
    decoder.load_state_dict(taken, assign=True)
    return decoder.requires_grad_(False).eval()


def save_decoder(decoder: Decoder, directory: Path, config: Mapping[str, object]) -> None:
    """Write plain weights by the names of config's family, and config.json.

    Raises CheckpointError if a linear is quantised: those have their own writer.
    """
    quantized = [name for name, module in decoder.named_modules() if isinstance(module, QuantizedLinear)]
    _refuse_names("cannot be written as plain weights; it has quantised linears", quantized, directory)
    plain = {name: tensor.detach().contiguous() for name, tensor in decoder.state_dict().items()}
    tensors = checkpoint_names(config).fuse_tensors(plain)
    directory.mkdir(parents=True, exist_ok=True)
    # Written beside and moved: the decoder may be mapped from the very file it replaces.
    partial = directory / f"{WEIGHTS_FILE}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(directory / WEIGHTS_FILE)
    (directory / INDEX_FILE).unlink(missing_ok=True)
    (directory / CONFIG_FILE).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")


def locate_tensors(directory: Path) -> dict[str, Path]:
    """Which file holds each tensor, from the index of a sharded checkpoint or from the one file there is.

    Names are those on disk. Raises CheckpointError for files whose headers do not describe them.
    """
    index = directory / INDEX_FILE
    if index.exists():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: weight_map must map tensor names to files")
        file_of_tensor = {
            str(name): _shard_path(directory, str(file))
            for name, file in cast("dict[object, object]", weight_map).items()
        }
        headers = {path: check_safetensors(path) for path in sorted(set(file_of_tensor.values()))}
        for name, path in file_of_tensor.items():
            if name not in headers[path].tensors:
                raise CheckpointError(f"{path} lacks {name}, which {INDEX_FILE} says it holds")
        return file_of_tensor
    path = _only_file(directory)
    return dict.fromkeys(check_safetensors(path).tensors, path)


def _only_file(directory: Path) -> Path:
    """The file of a checkpoint that is not sharded, under the usual name or the one that AutoGPTQ gives it."""
    path = directory / WEIGHTS_FILE
    named_by_autogptq = sorted(directory.glob("gptq_model*.safetensors"))
    if path.exists():
        return path
    if not named_by_autogptq:
        raise CheckpointError(f"{directory} has neither {WEIGHTS_FILE} nor {INDEX_FILE}{pickled_hint(directory)}")
    if len(named_by_autogptq) > 1:
        names = ", ".join(file.name for file in named_by_autogptq)
        raise CheckpointError(f"{directory} holds several quantised models: {names}; keep one of them")
    return named_by_autogptq[0]


def _shard_path(directory: Path, name: str) -> Path:
    if Path(name).name != name:
        raise CheckpointError(f"{directory / INDEX_FILE}: {name!r} is not the name of a file in the directory")
    path = directory / name
    if not path.exists():
        raise CheckpointError(f"{path} is named in {INDEX_FILE} and does not exist; the download may be incomplete")
    return path


def _insert_quantized(decoder: Decoder, directory: Path, *, with_layers: bool) -> None:
    """Replace each packed linear by its quantised module; a bias is filled in later with the plain tensors. Embeddings
    become plain numbers."""
    names = checkpoint_names(read_config(directory))

    def wanted(stored: str) -> bool:
        return with_layers or not names.ours(stored)[0].startswith(LAYER_PREFIX)

    modules = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    for name, matrix in iterate_quantized_linears(directory, wanted=wanted):
        module = modules.get(name)
        if module is None:
            raise CheckpointError(f"{directory}: {name} is quantised and the model has no linear of that name")
        found, shape = (matrix.out_features, matrix.in_features), tuple(module.weight.shape)
        if found != shape:
            raise CheckpointError(f"{directory}: {name} is {found}; config.json makes it {shape}")
        if isinstance(module, nn.Embedding):
            # Rows are looked up one by one, so the table is plain from here on.
            module.weight = nn.Parameter(_plain_table(matrix, module.weight.dtype))
            continue
        parent, _, attribute = name.rpartition(".")
        setattr(decoder.get_submodule(parent), attribute, QuantizedLinear(matrix, module.bias))


def _plain_table(matrix: QuantizedMatrix, dtype: torch.dtype) -> Tensor:
    """(vocabulary, hidden) in `dtype`; in runs, since float32 values of all of it would be the process's peak."""
    table = torch.empty((matrix.out_features, matrix.in_features), dtype=dtype)
    for first in range(0, matrix.out_features, _TABLE_RUN_ROWS):
        run = slice(first, first + _TABLE_RUN_ROWS)
        table[run] = take_outputs(matrix, run).dequantize(dtype)
    return table


def _places(file_of_tensor: Mapping[str, Path], names: CheckpointNames) -> dict[str, _Place]:
    """By the decoder's names. Tensors that follow from the config are left out."""
    places: dict[str, _Place] = {}
    for stored, file in file_of_tensor.items():
        ours = () if names.is_derived(stored) else names.ours(stored)
        for part, name in enumerate(ours):
            places[name] = _Place(file, stored, part if len(ours) > 1 else None)
    return places


def _read_tensors(
    file: Path,
    places: Mapping[str, _Place],
    names: CheckpointNames,
    expected: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    with safe_open(file, framework="pt") as source:
        for name, place in places.items():
            tensor: Tensor = source.get_tensor(place.stored)
            if place.part is not None:
                tensor = names.take_part(tensor, place.part)
            if tensor.shape != expected[name].shape:
                found, wanted = tuple(tensor.shape), tuple(expected[name].shape)
                raise CheckpointError(f"{file}: {place.stored} is {found}; config.json makes it {wanted}")
            if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise CheckpointError(
                    f"{file}: {place.stored} is {tensor.dtype}; float32, float16 and bfloat16 are read"
                )
            tensors[name] = tensor.to(dtype)
    return tensors


def _unexpected_names(found: Iterable[str], expected: Mapping[str, Tensor], *, tied: bool) -> list[str]:
    # A tied head is sometimes stored too; the embeddings are what counts, as in transformers.
    ignored = {"lm_head.weight"} if tied else set[str]()
    return [name for name in found if name not in expected and name not in ignored]


def _is_zero_bias(name: str, place: _Place) -> bool:
    """Some GPTQ writers store a bias of zeros for linears that have none."""
    if not name.endswith("_proj.bias"):
        return False
    with safe_open(place.file, framework="pt") as source:
        return not bool(source.get_tensor(place.stored).any())


def _refuse_names(problem: str, names: list[str], source: Path | str) -> None:
    if names:
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        raise CheckpointError(f"{source} {problem}: {', '.join(names[:_NAMES_SHOWN])}{more}")
