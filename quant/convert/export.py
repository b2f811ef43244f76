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
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from quant.convert.export_source import (
    ExportSource,
    gguf_name,
    gguf_shapes,
    model_metadata,
    open_source,
    plain_names,
    rope_factors,
    tokenizer_of,
)
from quant.errors import CheckpointError
from quant.formats.autogptq import iterate_quantized_linears
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
from quant.formats.gguf_families import ROPE_FACTORS
from quant.formats.gguf_writer import GgufWriter, publish_file
from quant.method.matrix import QuantizedMatrix
from quant.progress import ProgressSink

Rows = NDArray[np.generic]

_STAGE: Final = "Writing the GGUF file"
_LARGEST_HALF: Final = float(np.finfo(np.float16).max)


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
    source = open_source(directory)
    shapes = gguf_shapes(source)
    metadata = model_metadata(source, out.stem) | tokenizer_of(directory, shapes["token_embd.weight"][0])
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
    minimums = -scales * zeros.astype(np.float32)
    if matrix.bits == 4 and bool((np.abs(minimums) <= _LARGEST_HALF).all()):
        return "Q4_1", pack_q4_1(codes, scales, minimums)
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


def _tensors(source: ExportSource, options: _Options, tally: _Tally) -> Iterator[tuple[str, str, Rows]]:
    """Name, type and rows of every tensor, one in memory at a time."""
    factors = rope_factors(source)
    if factors is not None:
        yield ROPE_FACTORS, "F32", factors
    for name in sorted(plain_names(source), key=lambda name: (str(source.file_of_tensor[name]), name)):
        with safe_open(source.file_of_tensor[name], framework="pt") as file:
            values: Tensor = file.get_tensor(name)
        if values.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise CheckpointError(
                f"{source.directory}: {name} is {values.dtype}; expected float32, float16 or bfloat16"
            )
        type_name, rows = _stored_rows(name, values, options.embeddings)
        if values.dim() == 2:
            tally.types[type_name] += 1
        yield gguf_name(source, name), type_name, _permuted(source, name, rows)
    if source.is_quantized:
        for linear, matrix in iterate_quantized_linears(source.directory):
            is_plain = matrix.bits in options.float16_bits
            type_name, rows = _plain_rows(matrix.dequantize()) if is_plain else linear_rows(linear, matrix)
            tally.add_linear(linear, type_name, is_wanted=is_plain)
            yield gguf_name(source, f"{linear}.weight"), type_name, _permuted(source, f"{linear}.weight", rows)


def _stored_rows(name: str, values: Tensor, embeddings: Embeddings) -> tuple[str, Rows]:
    if values.dim() == 1:
        return "F32", values.to(torch.float32).numpy()
    is_vocabulary = name in ("model.embed_tokens.weight", "lm_head.weight")
    if is_vocabulary and embeddings is Embeddings.Q8_0 and values.shape[1] % BLOCK == 0:
        return "Q8_0", round_to_q8_0(values.to(torch.float32).numpy())
    return _plain_rows(values)


def _permuted(source: ExportSource, name: str, rows: Rows) -> Rows:
    """Rows of whole outputs change places; what is in a row does not, packed or not."""
    kv_heads = source.count("num_key_value_heads", source.num_heads)
    heads = source.family.rotary_heads(name, source.num_heads, kv_heads)
    if heads is None:
        return rows
    if len(rows) % (2 * heads):
        raise CheckpointError(f"{source.directory}: {name} has {len(rows)} rows; config.json makes it {heads} heads")
    return permute_rows(rows, heads)


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
