"""Turns a GGUF file into a Hugging Face model directory.

Undoes what the conversion to GGUF did: renames tensors, un-permutes the rows of q and k, and rebuilds tokenizer.json
(`gguf_tokenizer`). Anything not understood is refused by name, never guessed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor

from quant.errors import CheckpointError
from quant.formats.gguf import GgufFile, TensorInfo
from quant.formats.gguf_families import ROPE_FACTORS, GgufFamily, family_of_gguf, llama3_rope_factors
from quant.formats.gguf_metadata import GgufMetadata
from quant.formats.gguf_tokenizer import read_special_ids, read_tokenizer, read_tokenizer_config

Json: TypeAlias = "dict[str, object]"

# GGUF holds what Llama 3's scaling makes of the frequencies, not its parameters. These are every Llama 3.x model's.
_LOW_FREQ_FACTOR: Final = 1.0
_HIGH_FREQ_FACTOR: Final = 4.0
_ORIGINAL_POSITIONS: Final = 8192
_ROPE_TOLERANCE: Final = 1e-4


def convert_gguf(path: Path, directory: Path) -> None:
    """Writes config, weights, tokenizer and chat template of the GGUF file `path` into the existing `directory`.

    Matrices that are quantised in the file become float16 (float32 where float16 would overflow), rounding at most
    2⁻¹¹ of a value; everything else is kept exactly. Raises CheckpointError for what is not supported.
    """
    with GgufFile(path) as file:
        metadata = GgufMetadata(path, file.metadata)
        family = family_of_gguf(metadata.get("general.architecture", str), str(path))
        config = _model_config(metadata, family, file)
        tokenizer = read_tokenizer(metadata)
        weights = _read_weights(file, metadata, family)
    config["torch_dtype"] = str(weights["model.layers.0.mlp.down_proj.weight"].dtype).removeprefix("torch.")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    max_tokens = metadata.count(f"{family.name}.context_length")
    _write_json(directory / "config.json", config)
    _write_json(directory / "tokenizer.json", tokenizer)
    _write_json(directory / "tokenizer_config.json", read_tokenizer_config(metadata, max_tokens))
    _write_json(directory / "generation_config.json", read_special_ids(metadata))
    template = metadata.get_or("tokenizer.chat_template", str, "")
    if template:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_json(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _model_config(metadata: GgufMetadata, family: GgufFamily, file: GgufFile) -> Json:
    prefix = family.name
    num_heads = metadata.count(f"{prefix}.attention.head_count")
    hidden_size = metadata.count(f"{prefix}.embedding_length")
    head_dim = metadata.count(f"{prefix}.attention.key_length", hidden_size // num_heads)
    theta = metadata.short_float(f"{prefix}.rope.freq_base")
    _refuse_other_rotary(metadata, prefix, head_dim)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": len(metadata.strings("tokenizer.ggml.tokens")),
        "hidden_size": hidden_size,
        "intermediate_size": metadata.count(f"{prefix}.feed_forward_length"),
        "num_hidden_layers": metadata.count(f"{prefix}.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.count(f"{prefix}.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": metadata.count(f"{prefix}.context_length"),
        family.epsilon[1]: metadata.short_float(f"{prefix}.attention.{family.epsilon[0]}"),
        "rope_theta": theta,
        **_rope_scaling(file, metadata.path, head_dim, theta),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_logit_scale(metadata, family),
        **read_special_ids(metadata),
    }


def _logit_scale(metadata: GgufMetadata, family: GgufFamily) -> Json:
    key = f"{family.name}.logit_scale"
    if family.default_logit_scale is None or key not in metadata.values:
        return {}
    return {"logit_scale": metadata.short_float(key)}


def _refuse_other_rotary(metadata: GgufMetadata, prefix: str, head_dim: int) -> None:
    scaling = metadata.get_or(f"{prefix}.rope.scaling.type", str, "none")
    if scaling != "none":
        raise CheckpointError(f"{metadata.path} scales its rotary positions ({scaling!r}), which is not supported")
    rotary_dim = metadata.get_or(f"{prefix}.rope.dimension_count", int, head_dim)
    if rotary_dim != head_dim:
        raise CheckpointError(f"{metadata.path} rotates {rotary_dim} of {head_dim} dimensions, which is not supported")


def _rope_scaling(file: GgufFile, path: Path, head_dim: int, theta: float) -> Json:
    """config.json's `rope_scaling` for the factors in the file; they must be those of a Llama 3 model."""
    if ROPE_FACTORS not in file.tensors:
        return {}
    factors = file.read(ROPE_FACTORS)
    factor = float(factors.max())
    expected = llama3_rope_factors(
        head_dim,
        theta,
        factor=factor,
        low_freq_factor=_LOW_FREQ_FACTOR,
        high_freq_factor=_HIGH_FREQ_FACTOR,
        original_positions=_ORIGINAL_POSITIONS,
    )
    if factors.shape != expected.shape or not bool(abs(factors / expected - 1).max() < _ROPE_TOLERANCE):
        raise CheckpointError(f"{path} stretches its rotary positions otherwise than Llama 3; this is not supported")
    scaling: Json = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW_FREQ_FACTOR,
        "high_freq_factor": _HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": _ORIGINAL_POSITIONS,
    }
    return {"rope_scaling": scaling}


def _read_weights(file: GgufFile, metadata: GgufMetadata, family: GgufFamily) -> dict[str, Tensor]:
    num_heads = metadata.count(f"{family.name}.attention.head_count")
    num_kv_heads = metadata.count(f"{family.name}.attention.head_count_kv", num_heads)
    weights: dict[str, Tensor] = {}
    for tensor in file.tensors.values():
        if tensor.name == ROPE_FACTORS:
            continue
        name = family.model_name(tensor.name)
        if name is None:
            raise CheckpointError(
                f"{metadata.path}: tensor {tensor.name!r} has no place in a {family.name} model; the file is not "
                "supported"
            )
        values = torch.from_numpy(file.read(tensor.name))
        if name in weights:
            raise CheckpointError(f"{metadata.path}: {tensor.name!r} is not the only tensor for {name}")
        heads = family.rotary_heads(name, num_heads, num_kv_heads)
        if heads is not None:
            values = unpermute_rows(_divisible(values, heads, tensor, metadata.path), heads)
        weights[name] = values.to(_stored_dtype(tensor, values)).contiguous()
    # A count beyond the tensors there are is not worth a list of names.
    num_layers = min(metadata.count(f"{family.name}.block_count"), len(weights))
    missing = _expected_names(family, num_layers) - weights.keys()
    if missing:
        raise CheckpointError(f"{metadata.path} lacks {len(missing)} tensors, {min(missing)!r} among them")
    return weights


def _divisible(values: Tensor, heads: int, tensor: TensorInfo, path: Path) -> Tensor:
    if values.shape[0] % (2 * heads):
        raise CheckpointError(f"{path}: tensor {tensor.name!r} has {values.shape[0]} rows for {heads} heads")
    return values


def _expected_names(family: GgufFamily, num_layers: int) -> set[str]:
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    parts = family.layer_names.values()
    return names | {f"model.layers.{i}.{part}.weight" for i in range(num_layers) for part in parts}


def unpermute_rows(values: Tensor, num_heads: int) -> Tensor:
    """GGUF interleaves the two halves of each head's rotary dimensions; Hugging Face keeps them one after the other.

    values: (heads * head_dim, ...) in GGUF's order. Returns the same shape in Hugging Face's.
    """
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])  # (heads, head_dim / 2, half, ...)
    return pairs.transpose(1, 2).reshape(values.shape)


def _stored_dtype(tensor: TensorInfo, values: Tensor) -> torch.dtype:
    if tensor.type.name == "BF16":
        return torch.bfloat16
    halves = values.to(torch.float16)
    if tensor.type.name == "F32":
        # GGUF widens norms to float32. Most were bfloat16 before, which float16 holds: then one type does for all.
        return torch.float16 if torch.equal(halves.to(torch.float32), values) else torch.float32
    return torch.float16 if bool(halves.isfinite().all()) else torch.float32
