"""Turns a GGUF file into a Hugging Face model directory.

Undoes what the conversion to GGUF did: renames tensors, un-permutes the rows of q and k, and rebuilds tokenizer.json
(`gguf_tokenizer`). Anything not understood is refused by name, never guessed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor

from quant.errors import CheckpointError
from quant.formats.autogptq import QUANTIZE_CONFIG_FILE, pack_linear
from quant.formats.autogptq_writer import quantization_config
from quant.formats.gguf import GgufFile, TensorInfo
from quant.formats.gguf_blocks import BLOCK
from quant.formats.gguf_codes import holds_gptq_codes, layer_linears, read_matrix
from quant.formats.gguf_families import ROPE_FACTORS, GgufFamily, family_of_gguf, llama3_rope_factors
from quant.formats.gguf_metadata import GgufMetadata
from quant.formats.gguf_tokenizer import read_special_ids, read_tokenizer, read_tokenizer_config
from quant.method.gptq import GptqOptions
from quant.options import LinearChoice

Json: TypeAlias = "dict[str, object]"

# GGUF holds what Llama 3's scaling makes of the frequencies, not its parameters. These are every Llama 3.x model's.
_LOW_FREQ_FACTOR: Final = 1.0
_HIGH_FREQ_FACTOR: Final = 4.0
_ORIGINAL_POSITIONS: Final = 8192
_ROPE_TOLERANCE: Final = 1e-4


@dataclass(slots=True)
class _Packed:
    """Linears that stay codes: their packed tensors, and bits and group size by their names."""

    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    choices: dict[str, LinearChoice] = field(default_factory=dict[str, LinearChoice])
    is_symmetric: bool = True

    @property
    def replaced(self) -> frozenset[str]:
        """The plain tensors that they stand for."""
        return frozenset(f"{linear}.weight" for linear in self.choices)

    def settings(self) -> Json:
        bits = min(choice.bits for choice in self.choices.values())
        return quantization_config(self.choices, GptqOptions(bits, BLOCK, symmetric=self.is_symmetric))


def convert_gguf(path: Path, directory: Path, *, keep_codes: bool = False) -> None:
    """Writes config, weights, tokenizer and chat template of the GGUF file `path` into the existing `directory`.

    Matrices that are quantised in the file become float16 (float32 where float16 would overflow), rounding at most
    2⁻¹¹ of a value; everything else is kept exactly. Raises CheckpointError for what is not supported.
    keep_codes: write the layers' linears as GPTQ with the codes they have; only for files where `can_keep_codes`
    """
    with GgufFile(path) as file:
        metadata = GgufMetadata(path, file.metadata)
        family = family_of_gguf(metadata.get("general.architecture", str), str(path))
        config = _model_config(metadata, family, file)
        tokenizer = read_tokenizer(metadata)
        packed = _read_packed(file, metadata, family) if keep_codes else _Packed()
        weights = _read_weights(file, metadata, family, packed.replaced)
    if keep_codes:
        config["quantization_config"] = packed.settings()
        _write_json(directory / QUANTIZE_CONFIG_FILE, packed.settings())
    stored = next((weights[name].dtype for name in weights if name.endswith("down_proj.weight")), torch.float16)
    config["torch_dtype"] = str(stored).removeprefix("torch.")
    weights |= packed.tensors
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    max_tokens = metadata.count(f"{family.name}.context_length")
    _write_json(directory / "config.json", config)
    _write_json(directory / "tokenizer.json", tokenizer)
    _write_json(directory / "tokenizer_config.json", read_tokenizer_config(metadata, max_tokens))
    _write_json(directory / "generation_config.json", read_special_ids(metadata))
    template = metadata.get_or("tokenizer.chat_template", str, "")
    if template:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def can_keep_codes(path: Path) -> bool:
    """Whether every linear of the file's layers is codes that GPTQ holds as they are. CheckpointError as above."""
    with GgufFile(path) as file:
        return holds_gptq_codes(file)


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


def _read_packed(file: GgufFile, metadata: GgufMetadata, family: GgufFamily) -> _Packed:
    """Every linear of the layers."""
    num_heads = metadata.count(f"{family.name}.attention.head_count")
    num_kv_heads = metadata.count(f"{family.name}.attention.head_count_kv", num_heads)
    packed = _Packed()
    for tensor in layer_linears(file):
        name = family.model_name(tensor.name)
        if name is None:
            continue  # named when the plain tensors are read
        matrix = read_matrix(file, tensor)
        heads = family.rotary_heads(name, num_heads, num_kv_heads)
        if heads is not None:
            _divisible(matrix.codes, heads, tensor, metadata.path)
            codes, scales, zeros = (unpermute_rows(part, heads) for part in (matrix.codes, matrix.scales, matrix.zeros))
            matrix = replace(matrix, codes=codes, scales=scales, zeros=zeros)
        linear = name.removesuffix(".weight")
        if linear in packed.choices:
            raise CheckpointError(f"{metadata.path}: {tensor.name!r} is not the only tensor for {name}")
        packed.tensors |= {f"{linear}.{part}": words for part, words in pack_linear(matrix).items()}
        packed.choices[linear] = LinearChoice(matrix.bits, matrix.group_size)
        packed.is_symmetric &= tensor.type.name != "Q4_1"
    return packed


def _read_weights(
    file: GgufFile, metadata: GgufMetadata, family: GgufFamily, packed: frozenset[str]
) -> dict[str, Tensor]:
    """packed: names of those that are read as codes instead."""
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
        if name in packed:
            continue
        values = torch.from_numpy(file.read(tensor.name))
        if name in weights:
            raise CheckpointError(f"{metadata.path}: {tensor.name!r} is not the only tensor for {name}")
        heads = family.rotary_heads(name, num_heads, num_kv_heads)
        if heads is not None:
            values = unpermute_rows(_divisible(values, heads, tensor, metadata.path), heads)
        weights[name] = values.to(_stored_dtype(tensor, values)).contiguous()
    # A count beyond the tensors there are is not worth a list of names.
    num_layers = min(metadata.count(f"{family.name}.block_count"), len(weights) + len(packed))
    missing = _expected_names(family, num_layers) - weights.keys() - packed
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
