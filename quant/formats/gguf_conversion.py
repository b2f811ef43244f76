"""Turns a GGUF file of the Llama family into a Hugging Face model directory.

Undoes what the conversion to GGUF did: renames tensors, un-permutes the rows of q and k, and rebuilds tokenizer.json,
whose pre-tokenizer GGUF names but does not contain. Anything not understood is refused by name, never guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from quant.errors import CheckpointError
from quant.formats.gguf import GgufFile, MetadataValue, TensorInfo

Json: TypeAlias = "dict[str, object]"
T = TypeVar("T")

_TOP_LEVEL_NAMES: Final[Mapping[str, str]] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES: Final[Mapping[str, str]] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TENSOR_NAME: Final = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>[a-z_]+)\.(?P<kind>weight|bias)")
# Token types of GGUF: 1 normal, 3 control, 4 user-defined, 5 unused; 2 (unknown) and 6 (byte) belong to sentencepiece.
_CONTROL, _USER_DEFINED, _PLAIN_TYPES = 3, 4, frozenset({1, 5})


def _smollm_pre_tokenizer() -> Json:
    digits: Json = {"type": "Digits", "individual_digits": True}
    byte_level: Json = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"type": "Sequence", "pretokenizers": [digits, byte_level]}


PRE_TOKENIZERS: Final[Mapping[str, Callable[[], Json]]] = {"smollm": _smollm_pre_tokenizer}


@dataclass(frozen=True, slots=True)
class _Metadata:
    """Typed look-ups in a file's metadata; an absent or mistyped key is a CheckpointError that names it."""

    path: Path
    values: Mapping[str, MetadataValue]

    def get(self, key: str, kind: type[T]) -> T:
        value = self.values.get(key)
        # Compared by type, since True is an int to isinstance.
        if type(value) is not kind:
            found = "absent" if value is None else f"{value!r:.60}"
            raise CheckpointError(f"{self.path}: metadata {key!r} is {found}, expected {kind.__name__}")
        return value

    def get_or(self, key: str, kind: type[T], default: T) -> T:
        return self.get(key, kind) if key in self.values else default

    def strings(self, key: str) -> list[str]:
        values = self.get(key, list)
        return [str(value) for value in values]

    def short_float(self, key: str) -> float:
        # The file holds float32: 9.999999747e-06 was written as 1e-05.
        return float(str(np.float32(self.get(key, float))))


def convert_gguf(path: Path, directory: Path) -> None:
    """Writes config, weights, tokenizer and chat template of the GGUF file `path` into the existing `directory`.

    Matrices that are quantised in the file become float16 (float32 where float16 would overflow), rounding at most
    2⁻¹¹ of a value; everything else is kept exactly. Raises CheckpointError for what is not supported.
    """
    with GgufFile(path) as file:
        metadata = _Metadata(path, file.metadata)
        config = _model_config(metadata, file.tensors)
        tokenizer = _tokenizer_json(metadata)
        weights = _read_weights(file, metadata, config)
    config["torch_dtype"] = str(weights["model.layers.0.mlp.down_proj.weight"].dtype).removeprefix("torch.")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    _write_json(directory / "config.json", config)
    _write_json(directory / "tokenizer.json", tokenizer)
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(metadata))
    _write_json(directory / "generation_config.json", _special_token_ids(metadata))
    template = metadata.get_or("tokenizer.chat_template", str, "")
    if template:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_json(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _model_config(metadata: _Metadata, tensors: Mapping[str, TensorInfo]) -> Json:
    architecture = metadata.get("general.architecture", str)
    if architecture != "llama":
        raise CheckpointError(
            f"{metadata.path} has the architecture {architecture!r}; GGUF files are converted for 'llama' only: "
            "use the model's safetensors directory instead"
        )
    scaling = metadata.get_or("llama.rope.scaling.type", str, "none")
    if scaling != "none":
        raise CheckpointError(f"{metadata.path} scales its rotary positions ({scaling!r}), which is not supported")
    num_heads = metadata.get("llama.attention.head_count", int)
    hidden_size = metadata.get("llama.embedding_length", int)
    head_dim = metadata.get_or("llama.attention.key_length", int, hidden_size // num_heads)
    rotary_dim = metadata.get_or("llama.rope.dimension_count", int, head_dim)
    if rotary_dim != head_dim:
        raise CheckpointError(f"{metadata.path} rotates {rotary_dim} of {head_dim} dimensions, which is not supported")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata.strings("tokenizer.ggml.tokens")),
        "hidden_size": hidden_size,
        "intermediate_size": metadata.get("llama.feed_forward_length", int),
        "num_hidden_layers": metadata.get("llama.block_count", int),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.get_or("llama.attention.head_count_kv", int, num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": metadata.get("llama.context_length", int),
        "rms_norm_eps": metadata.short_float("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.short_float("llama.rope.freq_base"),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        **_special_token_ids(metadata),
    }


def _special_token_ids(metadata: _Metadata) -> Json:
    ids: Json = {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id", int),
    }
    if "tokenizer.ggml.padding_token_id" in metadata.values:
        ids["pad_token_id"] = metadata.get("tokenizer.ggml.padding_token_id", int)
    return ids


def _read_weights(file: GgufFile, metadata: _Metadata, config: Json) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for tensor in file.tensors.values():
        name = _huggingface_name(tensor.name, metadata.path)
        values = torch.from_numpy(file.read(tensor.name))
        if ".q_proj." in name:
            values = unpermute_rows(values, int(str(config["num_attention_heads"])))
        elif ".k_proj." in name:
            values = unpermute_rows(values, int(str(config["num_key_value_heads"])))
        weights[name] = values.to(_stored_dtype(tensor, values)).contiguous()
    missing = _expected_names(int(str(config["num_hidden_layers"]))) - weights.keys()
    if missing:
        raise CheckpointError(f"{metadata.path} lacks {len(missing)} tensors, {min(missing)!r} among them")
    return weights


def _expected_names(num_layers: int) -> set[str]:
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    return names | {f"model.layers.{i}.{part}.weight" for i in range(num_layers) for part in _LAYER_NAMES.values()}


def _huggingface_name(name: str, path: Path) -> str:
    match = _TENSOR_NAME.fullmatch(name)
    layer, part = (match["layer"], match["part"]) if match else (None, "")
    renamed = (_TOP_LEVEL_NAMES if layer is None else _LAYER_NAMES).get(part)
    if match is None or renamed is None:
        raise CheckpointError(f"{path}: tensor {name!r} has no place in a Llama model; the file is not supported")
    prefix = "" if layer is None else f"model.layers.{int(layer)}."
    return f"{prefix}{renamed}.{match['kind']}"


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


def _tokenizer_json(metadata: _Metadata) -> Json:
    model = metadata.get("tokenizer.ggml.model", str)
    pre_tokenizer = metadata.get_or("tokenizer.ggml.pre", str, "default")
    if model != "gpt2" or pre_tokenizer not in PRE_TOKENIZERS:
        known = ", ".join(repr(name) for name in PRE_TOKENIZERS)
        raise CheckpointError(
            f"{metadata.path} has the tokenizer {model!r} with pre-tokenizer {pre_tokenizer!r}; known are 'gpt2' with "
            f"{known}: use the model's safetensors directory, which contains its tokenizer"
        )
    if metadata.get_or("tokenizer.ggml.add_bos_token", bool, False):
        raise CheckpointError(f"{metadata.path} starts every text with a BOS token, which is not supported for GGUF")
    tokens = metadata.strings("tokenizer.ggml.tokens")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(metadata, tokens),
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[pre_tokenizer](),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata.strings("tokenizer.ggml.merges")],
        },
    }


def _added_tokens(metadata: _Metadata, tokens: list[str]) -> list[Json]:
    types = metadata.get("tokenizer.ggml.token_type", list)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise CheckpointError(
            f"{metadata.path} has {len(tokens):,} tokens, {len(set(tokens)):,} of them different, "
            f"and {len(types):,} token types; expected equal numbers"
        )
    unknown = set(types) - _PLAIN_TYPES - {_CONTROL, _USER_DEFINED}
    if unknown:
        raise CheckpointError(f"{metadata.path} has tokens of types {sorted(unknown)}, which byte-level BPE lacks")
    return [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for index, kind in enumerate(types)
        if kind not in _PLAIN_TYPES
    ]


def _tokenizer_config(metadata: _Metadata) -> Json:
    tokens = metadata.strings("tokenizer.ggml.tokens")
    config: Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata.get("llama.context_length", int),
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    for key, role in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        index = metadata.get_or(f"tokenizer.ggml.{key}_token_id", int, -1)
        if 0 <= index < len(tokens):
            config[f"{role}_token"] = tokens[index]
    return config
