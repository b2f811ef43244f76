"""Writes a GPTQ model directory in AutoGPTQ's layout, version 1: packed linears, everything else as the source has it.

Only float32 becomes float16: of a small model the embeddings would else be most of the file. Tokenizer, chat template
and generation settings are copied; `config.json` gains `quantization_config`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quant.errors import CheckpointError
from quant.formats.autogptq import FORMAT_V1, QUANTIZE_CONFIG_FILE, locate_tensors, pack_linear, read_json
from quant.formats.checkpoint_names import CheckpointNames, checkpoint_names
from quant.gptq import ActOrder, GptqOptions
from quant.matrix import QuantizedMatrix

WEIGHTS_FILE = "model.safetensors"
COPIED_FILES = (
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
    source: Path, target: Path, matrices: Mapping[str, QuantizedMatrix], options: GptqOptions, group_size: int
) -> None:
    """Fill the existing directory `target`. `matrices` by our decoder's linears (`model.layers.0.mlp.down_proj`).

    The file has the names of the source's own family, queries, keys and values fused again where it fuses them.
    Raises CheckpointError if the source has no weight for a matrix, values that float16 cannot hold, or fused linears
    with more than one grid.
    """
    config = read_json(source / "config.json")
    names = checkpoint_names(config)
    matrices = names.fuse_matrices(matrices)
    settings = quantization_config(matrices, options, group_size)
    tensors = _plain_tensors(source, matrices, names)
    if any(tensor.dtype is torch.float32 for tensor in tensors.values()):
        tensors = {name: narrowed(name, tensor) for name, tensor in tensors.items()}
        config.update({key: "float16" for key in ("dtype", "torch_dtype") if config.get(key) == "float32"})
    for name, matrix in matrices.items():
        tensors.update({f"{name}.{part}": tensor for part, tensor in pack_linear(matrix).items()})
    save_file(tensors, target / WEIGHTS_FILE, metadata={"format": "pt"})
    _write_json(target / "config.json", {**config, "quantization_config": settings})
    _write_json(target / QUANTIZE_CONFIG_FILE, settings)
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def quantization_config(
    matrices: Mapping[str, QuantizedMatrix], options: GptqOptions, group_size: int
) -> dict[str, object]:
    """Every field that other engines look at. `dynamic` names the linears whose bits differ from the rest."""
    settings: dict[str, object] = {
        "quant_method": "gptq",
        "checkpoint_format": FORMAT_V1,
        "bits": options.bits,
        "group_size": group_size,
        "sym": options.symmetric,
        # Static act-order keeps its groups in natural order, so the file is an ordinary one without reordering.
        "desc_act": options.act_order is ActOrder.SHUFFLED,
        "static_groups": options.act_order is ActOrder.STATIC,
        "damp_percent": options.damp,
        "true_sequential": True,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": ["causerie"]},
    }
    other = {name: matrix.bits for name, matrix in matrices.items() if matrix.bits != options.bits}
    if other:
        settings["dynamic"] = {f"+:{re.escape(name)}$": {"bits": bits} for name, bits in other.items()}
    return settings


def narrowed(name: str, tensor: Tensor) -> Tensor:
    """In the type it is written in. Raises CheckpointError if that cannot hold its values."""
    if tensor.dtype is not torch.float32:
        return tensor
    narrow = tensor.to(torch.float16)
    if not bool(narrow.isfinite().all()):
        raise CheckpointError(f"{name} has values that float16 cannot hold; convert the source to bfloat16 first")
    return narrow


def _plain_tensors(source: Path, matrices: Mapping[str, QuantizedMatrix], names: CheckpointNames) -> dict[str, Tensor]:
    """Everything of the source that is not quantised, by the names to write it with. `matrices` by names on disk."""
    place = {names.standard(stored): (stored, path) for stored, path in locate_tensors(source).items()}
    missing = [name for name in matrices if f"{name}.weight" not in place]
    if missing:
        raise CheckpointError(f"{source} has no weight for {missing[0]}")
    tensors: dict[str, Tensor] = {}
    for name, (stored, path) in place.items():
        if name.removesuffix(".weight") not in matrices and not names.is_derived(stored):
            with safe_open(path, framework="pt") as file:
                tensors[name] = file.get_tensor(stored)
    return tensors


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
