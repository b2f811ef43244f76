"""What a model directory says of itself, in the words of GGUF: tensors with their shapes, hyperparameters, tokenizer.

Reads headers and JSON only; `export` moves the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from quant.errors import CheckpointError
from quant.formats.autogptq import gptq_settings, is_packed_tensor, locate_tensors, read_json
from quant.formats.gguf_families import ROPE_FACTORS, GgufFamily, family_of_config, llama3_rope_factors
from quant.formats.gguf_tokenizer import SpecialIds, tokenizer_metadata
from quant.formats.gguf_writer import Value
from quant.formats.safetensors_header import check_safetensors

_DERIVED_SUFFIX: Final = "rotary_emb.inv_freq"
_QUANTIZATION_VERSION: Final = 2
_LARGEST_COUNT: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class ExportSource:
    """A model directory as far as it decides how tensors are written."""

    directory: Path
    config: Mapping[str, object]
    family: GgufFamily
    is_quantized: bool
    file_of_tensor: Mapping[str, Path]

    def count(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST_COUNT:
            raise CheckpointError(
                f"{self.directory / 'config.json'}: {key} is {value!r}, expected 1 to {_LARGEST_COUNT}"
            )
        return value

    @property
    def num_heads(self) -> int:
        return self.count("num_attention_heads")

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embeddings. transformers leaves the key out where it is the family's default."""
        tied = self.config.get("tie_word_embeddings")
        return self.family.is_always_tied if tied is None else tied is True

    @property
    def head_dim(self) -> int:
        return self.count("head_dim", self.count("hidden_size") // self.num_heads)

    def number(self, key: str, default: float) -> float:
        value = self.config.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{self.directory / 'config.json'}: {key} is {value!r}, expected a number")
        return float(value)


def open_source(directory: Path) -> ExportSource:
    config = read_json(directory / "config.json")
    if not config:
        raise CheckpointError(f"{directory} is not a model directory: it has no config.json")
    family = family_of_config(config, str(directory))
    is_quantized = gptq_settings(directory) is not None
    source = ExportSource(directory, config, family, is_quantized, locate_tensors(directory))
    if family.is_always_tied and not source.is_tied:
        raise CheckpointError(f"{directory} has a head of its own, which llama.cpp's {family.name} lacks")
    return source


def gguf_shapes(source: ExportSource) -> dict[str, tuple[int, ...]]:
    """The row-major shape of every tensor to write, by GGUF's name, from the headers alone."""
    stored = {
        name: tensor.shape
        for path in sorted(set(source.file_of_tensor.values()))
        for name, tensor in check_safetensors(path).tensors.items()
    }
    shapes: dict[str, tuple[int, ...]] = {}
    if rope_factors(source) is not None:
        shapes[ROPE_FACTORS] = (source.head_dim // 2,)
    for name in plain_names(source):
        shapes[gguf_name(source, name)] = stored[name]
    for name in stored:
        if source.is_quantized and name.endswith(".qweight"):
            linear = name.removesuffix(".qweight")
            shapes[gguf_name(source, f"{linear}.weight")] = _linear_shape(source, linear, stored)
    biases = [name for name in shapes if name.endswith(".bias")]
    if biases and not source.family.has_biases:
        raise CheckpointError(f"{source.directory}: llama.cpp's {source.family.name} has no biases; found {biases[0]}")
    missing = _expected_names(source) - shapes.keys()
    if missing:
        raise CheckpointError(f"{source.directory} lacks {len(missing)} tensors, for {min(missing)!r} among others")
    return shapes


def _linear_shape(source: ExportSource, linear: str, stored: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """(outputs, inputs) of a packed linear."""
    words, outputs = stored[f"{linear}.qweight"]
    inputs = stored.get(f"{linear}.g_idx")
    settings = gptq_settings(source.directory)
    assert settings is not None
    return outputs, words * 32 // settings.bits if inputs is None else inputs[0]


def plain_names(source: ExportSource) -> list[str]:
    """Names of the stored tensors that are not packed. A tied head is sometimes stored too; it is not written twice."""
    return [
        name
        for name in source.file_of_tensor
        if not (source.is_quantized and is_packed_tensor(name))
        and not (source.is_tied and name == "lm_head.weight")
        and not name.endswith(_DERIVED_SUFFIX)
    ]


def gguf_name(source: ExportSource, name: str) -> str:
    found = source.family.gguf_name(name)
    if found is None:
        raise CheckpointError(f"{source.directory}: GGUF has no place for {name} in a {source.family.name} model")
    return found


def _expected_names(source: ExportSource) -> set[str]:
    names = {"token_embd.weight", "output_norm.weight"}
    if not source.is_tied:
        names.add("output.weight")
    layers = range(source.count("num_hidden_layers"))
    return names | {f"blk.{layer}.{part}.weight" for layer in layers for part in source.family.layer_names}


def model_metadata(source: ExportSource, name: str) -> dict[str, Value]:
    prefix, epsilon = source.family.name, source.family.epsilon
    metadata: dict[str, Value] = {
        "general.architecture": prefix,
        "general.name": name,
        "general.quantization_version": _QUANTIZATION_VERSION,
        f"{prefix}.vocab_size": source.count("vocab_size"),
        f"{prefix}.context_length": _context_length(source),
        f"{prefix}.embedding_length": source.count("hidden_size"),
        f"{prefix}.feed_forward_length": source.count("intermediate_size"),
        f"{prefix}.block_count": source.count("num_hidden_layers"),
        f"{prefix}.attention.head_count": source.num_heads,
        f"{prefix}.attention.head_count_kv": source.count("num_key_value_heads", source.num_heads),
        f"{prefix}.attention.key_length": source.head_dim,
        f"{prefix}.attention.value_length": source.head_dim,
        f"{prefix}.attention.{epsilon[0]}": source.number(epsilon[1], source.family.default_epsilon),
        f"{prefix}.rope.dimension_count": source.head_dim,
        f"{prefix}.rope.freq_base": _rope_section(source)[1],
    }
    scale = source.family.default_logit_scale
    if scale is not None:
        metadata[f"{prefix}.logit_scale"] = source.number("logit_scale", scale)
    return metadata


def _context_length(source: ExportSource) -> int:
    """In tokens. Where attention slides, no more than its window: llama.cpp slides nothing in these architectures."""
    positions, window = source.count("max_position_embeddings"), source.config.get("sliding_window")
    slides = source.config.get("use_sliding_window") is not False
    return min(positions, window) if slides and type(window) is int and window > 0 else positions


def _rope_section(source: ExportSource) -> tuple[Mapping[str, object], float]:
    """The scaling's settings and the base, where transformers 5 or transformers 4 puts them."""
    section = source.config.get("rope_parameters") or source.config.get("rope_scaling") or {}
    settings = cast("Mapping[str, object]", section) if isinstance(section, dict) else {}
    theta = settings.get("rope_theta", source.config.get("rope_theta", source.family.default_rope_theta))
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise CheckpointError(f"{source.directory / 'config.json'}: rope_theta is {theta!r}, expected a number")
    return settings, float(theta)


def rope_factors(source: ExportSource) -> NDArray[np.float32] | None:
    settings, theta = _rope_section(source)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(f"{source.directory}: rope type {kind!r} is not written to GGUF; default and llama3 are")
    names = ("factor", "low_freq_factor", "high_freq_factor")
    try:
        factor, low, high = (float(str(settings[name])) for name in names)
        original = int(str(settings["original_max_position_embeddings"]))
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{source.directory / 'config.json'}: llama3 scaling is not complete: {error}") from error
    return llama3_rope_factors(
        source.head_dim, theta, factor=factor, low_freq_factor=low, high_freq_factor=high, original_positions=original
    )


def tokenizer_of(directory: Path, vocab_size: int) -> dict[str, Value]:
    definition = read_json(directory / "tokenizer.json")
    if not definition:
        raise CheckpointError(f"{directory} has no tokenizer.json; save its tokenizer again with transformers")
    return tokenizer_metadata(definition, _special_ids(directory, definition), vocab_size, str(directory))


def _special_ids(directory: Path, definition: Mapping[str, object]) -> SpecialIds:
    """Roles by name from tokenizer_config.json, else by id from generation_config.json or config.json.

    The end token of tokenizer_config.json comes first: a chat model's generation lists others beside it.
    """
    named = read_json(directory / "tokenizer_config.json")
    ids = {**read_json(directory / "config.json"), **read_json(directory / "generation_config.json")}
    vocabulary = _ids_of_tokens(definition)

    def by_name(role: str) -> int | None:
        value = named.get(f"{role}_token")
        text = cast("dict[str, object]", value).get("content") if isinstance(value, dict) else value
        return vocabulary.get(text) if isinstance(text, str) else None

    def by_id(role: str) -> list[int]:
        value = ids.get(f"{role}_token_id")
        values = cast("list[object]", value) if isinstance(value, list) else [value]
        return [item for item in values if type(item) is int]

    def first(role: str) -> int | None:
        return next((item for item in (by_name(role), *by_id(role)) if item is not None), None)

    eos = dict.fromkeys(item for item in (by_name("eos"), *by_id("eos")) if item is not None)
    return SpecialIds(bos=first("bos"), eos=tuple(eos), unknown=first("unk"), padding=first("pad"))


def _ids_of_tokens(definition: Mapping[str, object]) -> dict[str, int]:
    model = cast("Mapping[str, object]", definition.get("model") or {})
    vocabulary = dict(cast("Mapping[str, int]", model.get("vocab") or {}))
    for token in cast("list[Mapping[str, object]]", definition.get("added_tokens") or []):
        vocabulary[str(token["content"])] = cast("int", token["id"])
    return vocabulary
