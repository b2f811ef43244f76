"""Writes a model directory as one GGUF file for llama.cpp and Ollama, without rounding its GPTQ codes a second time.

A GPTQ matrix and a GGUF matrix are both integer codes with a scale for each run of inputs, so codes are moved, not
computed: symmetric 4-bit groups become Q4_0 and 8-bit ones Q8_0 bit for bit, asymmetric 4-bit groups Q4_1, whose
minimum alone is rounded to fp16. One matrix is in memory at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from quant.errors import CheckpointError
from quant.formats.autogptq import gptq_settings, is_packed_tensor, iterate_quantized_linears, locate_tensors, read_json
from quant.formats.gguf_blocks import (
    BLOCK,
    Q4_0_ZERO,
    Q8_0_ZERO,
    pack_q4_0,
    pack_q4_1,
    pack_q8_0,
    permute_rows,
    round_to_q8_0,
)
from quant.formats.gguf_families import ROPE_FACTORS, GgufFamily, family_of_config, llama3_rope_factors
from quant.formats.gguf_tokenizer import SpecialIds, tokenizer_metadata
from quant.formats.gguf_writer import GgufWriter, Value, publish_file
from quant.formats.safetensors_header import check_safetensors
from quant.matrix import QuantizedMatrix
from quant.progress import ProgressSink

Rows = NDArray[np.generic]

_STAGE: Final = "Writing the GGUF file"
_DERIVED_SUFFIX: Final = "rotary_emb.inv_freq"
_QUANTIZATION_VERSION: Final = 2


class Embeddings(StrEnum):
    """What becomes of the embeddings and the head where the model directory holds them as plain numbers."""

    AS_STORED = "as-stored"
    Q8_0 = "q8_0"


@dataclass(frozen=True, slots=True)
class ExportReport:
    """`num_of_type`: matrices by GGUF type. `notes`: what could not be moved exactly, one sentence each."""

    file_bytes: int
    num_of_type: Mapping[str, int]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Options:
    embeddings: Embeddings
    float16_bits: frozenset[int]


@dataclass(slots=True)
class _Tally:
    """What has been written so far: matrices by type, and the quantised linears that had to become plain numbers."""

    types: Counter[str] = field(default_factory=Counter[str])
    widened: list[str] = field(default_factory=list[str])

    def add_linear(self, linear: str, type_name: str, *, is_wanted: bool) -> None:
        self.types[type_name] += 1
        if not type_name.startswith("Q") and not is_wanted:
            self.widened.append(linear)


@dataclass(frozen=True, slots=True)
class _Source:
    """A model directory as far as it decides how tensors are written."""

    directory: Path
    config: Mapping[str, object]
    family: GgufFamily
    is_quantized: bool
    file_of_tensor: Mapping[str, Path]

    def count(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self.directory / 'config.json'}: {key} is {value!r}, expected a positive number")
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


def export_gguf(
    directory: Path,
    out: Path,
    progress: ProgressSink,
    *,
    chat_template: str | None = None,
    embeddings: Embeddings = Embeddings.AS_STORED,
    float16_bits: Collection[int] = (),
) -> ExportReport:
    """Write the model in `directory`, GPTQ or plain, as the new file `out`, which appears whole or not at all.

    float16_bits: quantised linears of so many bits become F16, which llama.cpp multiplies by activations of 16 bits
        instead of 8; their values are rounded, by at most 2⁻¹¹
    Raises CheckpointError for a model, a tokenizer or a quantisation that GGUF cannot express, before anything is
    written where that can be known before, and for a full disk.
    """
    options = _Options(embeddings, frozenset(float16_bits))
    source = _open_source(directory)
    shapes = _gguf_shapes(source)
    metadata = _model_metadata(source, out.stem) | _tokenizer_of(directory, shapes["token_embd.weight"][0])
    if chat_template is not None:
        metadata["tokenizer.chat_template"] = chat_template
    tally = _Tally()
    with publish_file(out) as file:
        writer = GgufWriter(file, metadata, shapes)
        for done, (name, type_name, rows) in enumerate(_tensors(source, options, tally), start=1):
            writer.write(name, type_name, rows)
            progress.update(_STAGE, done, len(shapes))
        writer.finish()
    return ExportReport(out.stat().st_size, dict(tally.types), _notes(tally))


def linear_rows(name: str, matrix: QuantizedMatrix) -> tuple[str, Rows]:
    """A GPTQ matrix as GGUF's type and rows, (out, bytes of a row) uint8.

    What no block type expresses (8-bit asymmetric, groups that are not whole blocks) becomes F16, (out, in), a
    rounding of at most 2⁻¹¹ of a value; BF16 or F32 where F16 would overflow. Raises CheckpointError for true
    act-order: its groups are scattered over the row, a block's numbers stand side by side.
    """
    group_of_block = _group_of_block(name, matrix)
    if group_of_block is None:
        return _plain_rows(matrix.dequantize())
    codes = matrix.codes.numpy()
    scales, zeros = matrix.scales.numpy()[:, group_of_block], matrix.zeros.numpy()[:, group_of_block]
    if matrix.bits == 4 and bool((zeros == Q4_0_ZERO).all()):
        return "Q4_0", pack_q4_0(codes, scales)
    if matrix.bits == 4:
        return "Q4_1", pack_q4_1(codes, scales, -scales * zeros.astype(np.float32))
    if matrix.bits == 8 and bool((zeros == Q8_0_ZERO).all()):
        return "Q8_0", pack_q8_0(codes, scales)
    return _plain_rows(matrix.dequantize())


def _group_of_block(name: str, matrix: QuantizedMatrix) -> NDArray[np.intp] | None:
    """Which group's scale each block of a row has, (in / 32,); None where blocks and groups do not fit."""
    groups = np.arange(matrix.in_features) // matrix.group_size
    if matrix.group_of_input is not None:
        groups = matrix.group_of_input.numpy().astype(np.intp)
    if bool((np.diff(groups) < 0).any()):
        raise CheckpointError(
            f"{name} is quantised in shuffled act-order, whose groups GGUF's blocks cannot follow; quantise the source "
            "model again with --act-order (static) or without it"
        )
    if matrix.in_features % BLOCK:
        return None
    blocks = groups.reshape(-1, BLOCK)
    return blocks[:, 0] if bool((blocks == blocks[:, :1]).all()) else None


def _plain_rows(values: Tensor) -> tuple[str, Rows]:
    """The smallest plain type that holds the values: exactly where they come from two bytes, else F16 to 2⁻¹¹."""
    halves = values.to(torch.float16)
    is_exact = torch.equal(halves.to(torch.float32), values.to(torch.float32))
    if values.dtype is torch.bfloat16 and not is_exact:
        return "BF16", values.contiguous().view(torch.int16).numpy()
    if bool(halves.isfinite().all()):
        return "F16", halves.contiguous().numpy()
    return "F32", values.to(torch.float32).contiguous().numpy()


def _open_source(directory: Path) -> _Source:
    config = read_json(directory / "config.json")
    if not config:
        raise CheckpointError(f"{directory} is not a model directory: it has no config.json")
    family = family_of_config(config, str(directory))
    is_quantized = gptq_settings(directory) is not None
    source = _Source(directory, config, family, is_quantized, locate_tensors(directory))
    if family.is_always_tied and not source.is_tied:
        raise CheckpointError(f"{directory} has a head of its own, which llama.cpp's {family.name} lacks")
    return source


def _gguf_shapes(source: _Source) -> dict[str, tuple[int, ...]]:
    """The row-major shape of every tensor to write, by GGUF's name, from the headers alone."""
    stored = {
        name: tensor.shape
        for path in sorted(set(source.file_of_tensor.values()))
        for name, tensor in check_safetensors(path).tensors.items()
    }
    shapes: dict[str, tuple[int, ...]] = {}
    if _rope_factors(source) is not None:
        shapes[ROPE_FACTORS] = (source.head_dim // 2,)
    for name in _plain_names(source):
        shapes[_gguf_name(source, name)] = stored[name]
    for name in stored:
        if source.is_quantized and name.endswith(".qweight"):
            linear = name.removesuffix(".qweight")
            shapes[_gguf_name(source, f"{linear}.weight")] = _linear_shape(source, linear, stored)
    biases = [name for name in shapes if name.endswith(".bias")]
    if biases and not source.family.has_biases:
        raise CheckpointError(f"{source.directory}: llama.cpp's {source.family.name} has no biases; found {biases[0]}")
    missing = _expected_names(source) - shapes.keys()
    if missing:
        raise CheckpointError(f"{source.directory} lacks {len(missing)} tensors, for {min(missing)!r} among others")
    return shapes


def _linear_shape(source: _Source, linear: str, stored: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """(outputs, inputs) of a packed linear."""
    words, outputs = stored[f"{linear}.qweight"]
    inputs = stored.get(f"{linear}.g_idx")
    settings = gptq_settings(source.directory)
    assert settings is not None
    return outputs, words * 32 // settings.bits if inputs is None else inputs[0]


def _plain_names(source: _Source) -> list[str]:
    """Names of the stored tensors that are not packed. A tied head is sometimes stored too; it is not written twice."""
    return [
        name
        for name in source.file_of_tensor
        if not (source.is_quantized and is_packed_tensor(name))
        and not (source.is_tied and name == "lm_head.weight")
        and not name.endswith(_DERIVED_SUFFIX)
    ]


def _gguf_name(source: _Source, name: str) -> str:
    found = source.family.gguf_name(name)
    if found is None:
        raise CheckpointError(f"{source.directory}: GGUF has no place for {name} in a {source.family.name} model")
    return found


def _expected_names(source: _Source) -> set[str]:
    names = {"token_embd.weight", "output_norm.weight"}
    if not source.is_tied:
        names.add("output.weight")
    layers = range(source.count("num_hidden_layers"))
    return names | {f"blk.{layer}.{part}.weight" for layer in layers for part in source.family.layer_names}


def _tensors(source: _Source, options: _Options, tally: _Tally) -> Iterator[tuple[str, str, Rows]]:
    """Name, type and rows of every tensor, one in memory at a time."""
    factors = _rope_factors(source)
    if factors is not None:
        yield ROPE_FACTORS, "F32", factors
    for name in sorted(_plain_names(source), key=lambda name: (str(source.file_of_tensor[name]), name)):
        with safe_open(source.file_of_tensor[name], framework="pt") as file:
            values: Tensor = file.get_tensor(name)
        if values.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise CheckpointError(
                f"{source.directory}: {name} is {values.dtype}; expected float32, float16 or bfloat16"
            )
        type_name, rows = _stored_rows(name, values, options.embeddings)
        if values.dim() == 2:
            tally.types[type_name] += 1
        yield _gguf_name(source, name), type_name, _permuted(source, name, rows)
    if source.is_quantized:
        for linear, matrix in iterate_quantized_linears(source.directory):
            is_plain = matrix.bits in options.float16_bits
            type_name, rows = _plain_rows(matrix.dequantize()) if is_plain else linear_rows(linear, matrix)
            tally.add_linear(linear, type_name, is_wanted=is_plain)
            yield _gguf_name(source, f"{linear}.weight"), type_name, _permuted(source, f"{linear}.weight", rows)


def _stored_rows(name: str, values: Tensor, embeddings: Embeddings) -> tuple[str, Rows]:
    if values.dim() == 1:
        return "F32", values.to(torch.float32).numpy()
    is_vocabulary = name in ("model.embed_tokens.weight", "lm_head.weight")
    if is_vocabulary and embeddings is Embeddings.Q8_0 and values.shape[1] % BLOCK == 0:
        return "Q8_0", round_to_q8_0(values.to(torch.float32).numpy())
    return _plain_rows(values)


def _permuted(source: _Source, name: str, rows: Rows) -> Rows:
    """Rows of whole outputs change places; what is in a row does not, packed or not."""
    kv_heads = source.count("num_key_value_heads", source.num_heads)
    heads = source.family.rotary_heads(name, source.num_heads, kv_heads)
    return rows if heads is None else permute_rows(rows, heads)


def _model_metadata(source: _Source, name: str) -> dict[str, Value]:
    prefix, epsilon = source.family.name, source.family.epsilon
    metadata: dict[str, Value] = {
        "general.architecture": prefix,
        "general.name": name,
        "general.quantization_version": _QUANTIZATION_VERSION,
        f"{prefix}.vocab_size": source.count("vocab_size"),
        f"{prefix}.context_length": source.count("max_position_embeddings"),
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


def _rope_section(source: _Source) -> tuple[Mapping[str, object], float]:
    """The scaling's settings and the base, where transformers 5 or transformers 4 puts them."""
    section = source.config.get("rope_parameters") or source.config.get("rope_scaling") or {}
    settings = cast("Mapping[str, object]", section) if isinstance(section, dict) else {}
    theta = settings.get("rope_theta", source.config.get("rope_theta", source.family.default_rope_theta))
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise CheckpointError(f"{source.directory / 'config.json'}: rope_theta is {theta!r}, expected a number")
    return settings, float(theta)


def _rope_factors(source: _Source) -> NDArray[np.float32] | None:
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


def _tokenizer_of(directory: Path, vocab_size: int) -> dict[str, Value]:
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


def _notes(tally: _Tally) -> tuple[str, ...]:
    notes: list[str] = []
    if tally.types["Q4_1"]:
        notes.append("asymmetric groups are Q4_1: codes and scales as they were, the minimum rounded to fp16")
    if tally.widened:
        notes.append(
            f"{len(tally.widened)} quantised linears are F16, twice or four times as large, since no block type "
            f"expresses them (8-bit asymmetric, or groups that are not a multiple of {BLOCK}): {tally.widened[0]} first"
        )
    return tuple(notes)
