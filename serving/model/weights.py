"""Model directory -> `Decoder`, and back. Only safetensors are read, one tensor at a time through a memory map.

Plain and GPTQ checkpoints load through the same function: packed linears become `QuantizedLinear` under the name that
the plain one would have. Tensors that are missing, unexpected or of another shape are errors that name them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quant.errors import CheckpointError
from quant.formats.autogptq import gptq_settings, is_packed_tensor, iterate_quantized_linears
from quant.formats.pickled import pickled_hint
from quant.int4_linear import QuantizedLinear
from serving.model.json_files import read_object
from serving.model.spec import DecoderSpec, spec_from_config
from serving.model.transformer import Decoder

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Old Llama checkpoints store the rotary frequencies; they follow from the config.
_DERIVED_SUFFIX = "rotary_emb.inv_freq"
_NAMES_SHOWN = 8


def read_config(directory: Path) -> dict[str, object]:
    """config.json's content. CheckpointError if it is absent or not an object."""
    return read_object(directory / CONFIG_FILE)


def load_spec(directory: Path) -> DecoderSpec:
    return spec_from_config(read_config(directory))


def load_decoder(directory: Path, *, dtype: torch.dtype = torch.float32) -> Decoder:
    """Build the decoder of a model directory on the CPU, plain parameters in `dtype`.

    Tensors already stored in `dtype` stay memory-mapped (private: writing to them does not change the file).
    """
    decoder = Decoder(load_spec(directory), dtype=dtype, device="meta")
    file_of_tensor = locate_tensors(directory)
    # Without GPTQ settings nothing is packed, and tensors of such names are unexpected ones.
    is_quantized = gptq_settings(directory) is not None
    if is_quantized:
        _insert_quantized_linears(decoder, directory)
        file_of_tensor = {name: file for name, file in file_of_tensor.items() if not is_packed_tensor(name)}
    expected = dict(decoder.state_dict())
    unexpected = _unexpected_names(file_of_tensor, expected, tied=decoder.spec.tied_embeddings)
    if is_quantized:
        unexpected = [name for name in unexpected if not _is_zero_bias(name, file_of_tensor[name])]
    _refuse_names("has tensors that the model lacks", unexpected, directory)
    _refuse_names("lacks tensors", [name for name in expected if name not in file_of_tensor], directory)
    for file in sorted({file_of_tensor[name] for name in expected}):
        names = [name for name in expected if file_of_tensor[name] == file]
        decoder.load_state_dict(_read_tensors(file, names, expected, dtype), strict=False, assign=True)
    return decoder.eval()


def decoder_from_tensors(config: Mapping[str, object], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Decoder:
    """A decoder over weights that are already in memory, such as a model in training; no file is read.

    config:  config.json's content
    tensors: plain weights by their Hugging Face names; those in `dtype` on the CPU are shared, not copied
    Raises CheckpointError for tensors that are missing, unexpected or of another shape.
    """
    decoder = Decoder(spec_from_config(config), dtype=dtype, device="meta")
    expected = dict(decoder.state_dict())
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
    """Write plain weights and config.json. CheckpointError if a linear is quantised: those have their own writer."""
    quantized = [name for name, module in decoder.named_modules() if isinstance(module, QuantizedLinear)]
    _refuse_names("cannot be written as plain weights; it has quantised linears", quantized, directory)
    tensors = {name: tensor.detach().contiguous() for name, tensor in decoder.state_dict().items()}
    directory.mkdir(parents=True, exist_ok=True)
    # Written beside and moved: the decoder may be mapped from the very file it replaces.
    partial = directory / f"{WEIGHTS_FILE}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(directory / WEIGHTS_FILE)
    (directory / INDEX_FILE).unlink(missing_ok=True)
    (directory / CONFIG_FILE).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")


def locate_tensors(directory: Path) -> dict[str, Path]:
    """Which file holds each tensor, from the index of a sharded checkpoint or from the one file there is."""
    index = directory / INDEX_FILE
    if index.exists():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: weight_map must map tensor names to files")
        return {
            str(name): _shard_path(directory, str(file))
            for name, file in cast("dict[object, object]", weight_map).items()
        }
    path = directory / WEIGHTS_FILE
    if not path.exists():
        raise CheckpointError(f"{directory} has neither {WEIGHTS_FILE} nor {INDEX_FILE}{pickled_hint(directory)}")
    try:
        with safe_open(path, framework="pt") as file:
            return dict.fromkeys(file.keys(), path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def _shard_path(directory: Path, name: str) -> Path:
    if Path(name).name != name:
        raise CheckpointError(f"{directory / INDEX_FILE}: {name!r} is not the name of a file in the directory")
    path = directory / name
    if not path.exists():
        raise CheckpointError(f"{path} is named in {INDEX_FILE} and does not exist; the download may be incomplete")
    return path


def _insert_quantized_linears(decoder: Decoder, directory: Path) -> None:
    """Replace each packed linear by its quantised module; a bias is filled in later with the plain tensors."""
    linears = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    for name, matrix in iterate_quantized_linears(directory):
        linear = linears.get(name)
        if linear is None:
            raise CheckpointError(f"{directory}: {name} is quantised and the model has no linear of that name")
        shape = (linear.out_features, linear.in_features)
        if (matrix.out_features, matrix.in_features) != shape:
            found = (matrix.out_features, matrix.in_features)
            raise CheckpointError(f"{directory}: {name} is {found}; config.json makes it {shape}")
        parent, _, attribute = name.rpartition(".")
        setattr(decoder.get_submodule(parent), attribute, QuantizedLinear(matrix, linear.bias))


def _read_tensors(
    file: Path, names: Iterable[str], expected: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(file, framework="pt") as source:
            for name in names:
                tensor: Tensor = source.get_tensor(name)
                if tensor.shape != expected[name].shape:
                    found, wanted = tuple(tensor.shape), tuple(expected[name].shape)
                    raise CheckpointError(f"{file}: {name} is {found}; config.json makes it {wanted}")
                if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                    raise CheckpointError(f"{file}: {name} is {tensor.dtype}; float32, float16 and bfloat16 are read")
                tensors[name] = tensor.to(dtype)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error
    return tensors


def _unexpected_names(found: Iterable[str], expected: Mapping[str, Tensor], *, tied: bool) -> list[str]:
    # A tied head is sometimes stored too; the embeddings are what counts, as in transformers.
    ignored = {"lm_head.weight"} if tied else set[str]()
    return [
        name for name in found if name not in expected and name not in ignored and not name.endswith(_DERIVED_SUFFIX)
    ]


def _is_zero_bias(name: str, file: Path) -> bool:
    """Some GPTQ writers store a bias of zeros for linears that have none."""
    if not name.endswith("_proj.bias"):
        return False
    with safe_open(file, framework="pt") as source:
        return not bool(source.get_tensor(name).any())


def _refuse_names(problem: str, names: list[str], source: Path | str) -> None:
    if names:
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        raise CheckpointError(f"{source} {problem}: {', '.join(names[:_NAMES_SHOWN])}{more}")
