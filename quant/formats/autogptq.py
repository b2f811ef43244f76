"""AutoGPTQ's tensors, packed and read in versions 1 ("gptq") and 2 ("gptq_v2").

For a linear `p`: `p.qweight` int32 (in / pack, out), `p.qzeros` int32 (groups, out / pack), `p.scales` fp16
(groups, out), `p.g_idx` int32 (in,). Version 1 stores each zero point minus one, version 2 as it is. Only safetensors
are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor

from quant.errors import CheckpointError
from quant.formats.checkpoint_format import CheckpointFormat
from quant.formats.checkpoint_names import checkpoint_names
from quant.formats.pickled import pickled_hint
from quant.formats.safetensors_header import check_safetensors
from quant.method.matrix import QuantizedMatrix
from quant.method.packing import PACKABLE_BITS, WORD_BITS, codes_per_word, pack_columns, pack_rows, unpack_columns

PACKED_SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")
QUANTIZE_CONFIG_FILE = "quantize_config.json"


@dataclass(frozen=True, slots=True)
class GptqSettings:
    """What a checkpoint says of its own quantisation."""

    bits: int
    group_size: int | None
    checkpoint_format: CheckpointFormat


def is_packed_tensor(name: str) -> bool:
    """Whether a tensor of this name belongs to a quantised linear rather than to the plain part of the model."""
    return name.endswith(PACKED_SUFFIXES)


def gptq_settings(directory: Path) -> GptqSettings | None:
    """The directory's GPTQ settings, or None if it is not quantised. CheckpointError for any format not read here."""
    section = read_json(directory / "config.json").get("quantization_config")
    source = "config.json"
    if section is None:
        source = QUANTIZE_CONFIG_FILE
        section = read_json(directory / source) or None
    if section is None:
        return None
    if not isinstance(section, dict):
        raise CheckpointError(f"{directory / source}: the quantisation settings must be an object")
    return parse_settings(cast("dict[str, object]", section), str(directory / source))


def parse_settings(section: Mapping[str, object], origin: str) -> GptqSettings:
    """Check the quantisation settings read from `origin`; CheckpointError names what is not supported."""
    method = section.get("quant_method", "gptq")
    if method != "gptq":
        raise CheckpointError(f"{origin}: quant_method {method!r} is not supported; 'gptq' is")
    checkpoint_format = section.get("checkpoint_format") or CheckpointFormat.V1
    if section.get("is_marlin_format") is True:
        checkpoint_format = "marlin"
    if checkpoint_format not in list(CheckpointFormat):
        raise CheckpointError(
            f"{origin}: checkpoint_format {checkpoint_format!r} is not known; known are {', '.join(CheckpointFormat)}. "
            "Quantise the source model again with `causerie quantize`"
        )
    bits = section.get("bits")
    if bits not in PACKABLE_BITS:
        raise CheckpointError(f"{origin}: {bits!r}-bit weights are not supported; 4 and 8 are")
    group_size = section.get("group_size", -1)
    if not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        raise CheckpointError(f"{origin}: group_size must be a positive number or -1; found {group_size!r}")
    return GptqSettings(
        bits=cast("int", bits),
        group_size=None if group_size == -1 else group_size,
        checkpoint_format=CheckpointFormat(str(checkpoint_format)),
    )


def iterate_quantized_linears(
    directory: Path, *, wanted: Callable[[str], bool] = lambda _: True
) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Each quantised linear's name in our decoder (`model.layers.0.self_attn.q_proj`) and matrix; embeddings too.

    One tensor on disk is in memory at a time; a fused one comes as the linears that it is made of.
    wanted: of a name on disk, whether to read it
    """
    settings = gptq_settings(directory)
    if settings is None:
        raise CheckpointError(f"{directory}: neither config.json nor {QUANTIZE_CONFIG_FILE} says how it is quantised")
    names = checkpoint_names(read_json(directory / "config.json"))
    file_of_tensor = locate_tensors(directory)
    with ExitStack() as stack:
        # Opened once each: opening parses the whole header, as long as everything else together for many tensors.
        file_at = {path: stack.enter_context(safe_open(path, framework="pt")) for path in set(file_of_tensor.values())}
        for name in sorted(file_of_tensor):
            linear = name.removesuffix(".qweight")
            if linear == name or not wanted(linear):
                continue
            stored = {suffix: linear + suffix for suffix in PACKED_SUFFIXES if linear + suffix in file_of_tensor}
            tensors: dict[str, Tensor] = {
                suffix.removeprefix("."): file_at[file_of_tensor[full]].get_tensor(full)
                for suffix, full in stored.items()
            }
            yield from names.split_matrix(linear, unpack_linear(linear, tensors, settings))


def read_quantized_linears(directory: Path) -> dict[str, QuantizedMatrix]:
    return dict(iterate_quantized_linears(directory))


def pack_linear(
    matrix: QuantizedMatrix, checkpoint_format: CheckpointFormat = CheckpointFormat.V1
) -> dict[str, Tensor]:
    """The four tensors of one linear: qweight, qzeros, scales, g_idx.

    Raises ValueError for a zero point of 0 in version 1: minus one it would borrow from every later code of its word.
    """
    return {"qweight": pack_rows(matrix.codes.t(), matrix.bits), **pack_grids(matrix, checkpoint_format)}


def pack_grids(matrix: QuantizedMatrix, checkpoint_format: CheckpointFormat = CheckpointFormat.V1) -> dict[str, Tensor]:
    """All but the codes: qzeros, scales, g_idx. Raises ValueError as `pack_linear` does."""
    per_word = codes_per_word(matrix.bits)
    if matrix.in_features % per_word or matrix.out_features % per_word:
        raise ValueError(
            f"a {matrix.out_features} x {matrix.in_features} matrix does not fill whole words of {per_word} codes"
        )
    zeros = matrix.zeros.t().to(torch.int64)
    if checkpoint_format is CheckpointFormat.V1:
        if int(zeros.min()) < 1:
            raise ValueError("GPTQ version 1 cannot store zero point 0; shift the grid so that it starts at 1")
        zeros = zeros - 1
    trivial = torch.arange(matrix.in_features, dtype=torch.int32) // matrix.group_size
    return {
        "qzeros": pack_columns(zeros, matrix.bits),
        "scales": matrix.scales.t().to(torch.float16).contiguous(),
        "g_idx": trivial if matrix.group_of_input is None else matrix.group_of_input,
    }


def unpack_linear(name: str, tensors: Mapping[str, Tensor], settings: GptqSettings) -> QuantizedMatrix:
    """Rebuild linear `name` from its stored tensors. CheckpointError says what is missing, misshapen or unsupported."""
    return open_packed(name, tensors, settings).matrix()


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A quantised matrix whose codes stay packed, for tables of which some rows are wanted at a time.

    qweight: int32 (in / pack, out); all else as in `QuantizedMatrix`
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int
    group_of_input: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.scales.shape[0], self.qweight.shape[0] * codes_per_word(self.bits)

    def matrix(self, outputs: slice | Tensor = slice(None)) -> QuantizedMatrix:
        """Those outputs, a run of them or by their numbers (n,) int64."""
        return QuantizedMatrix(
            codes=unpack_columns(self.qweight[:, outputs].t(), self.bits),
            scales=self.scales[outputs],
            zeros=self.zeros[outputs],
            bits=self.bits,
            group_size=self.group_size,
            group_of_input=self.group_of_input,
        )


def open_packed(name: str, tensors: Mapping[str, Tensor], settings: GptqSettings) -> PackedMatrix:
    """Linear `name` from its stored tensors, without unpacking its codes. Raises as `unpack_linear` does."""
    for part in ("qweight", "qzeros", "scales"):
        if part not in tensors:
            raise CheckpointError(f"{name}: tensor {name}.{part} is missing")
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    if qweight.dim() != 2 or scales.dim() != 2:
        raise CheckpointError(f"{name}: qweight {tuple(qweight.shape)} and scales {tuple(scales.shape)} must be tables")
    g_idx = tensors.get("g_idx")
    bits = settings.bits if g_idx is None else _bits_from_shape(name, qweight, g_idx)
    in_features, out_features = qweight.shape[0] * WORD_BITS // bits, qweight.shape[1]
    groups = scales.shape[0]
    if scales.shape[1] != out_features:
        raise CheckpointError(f"{name}: scales {tuple(scales.shape)} do not fit {out_features} outputs")
    group_size, group_of_input = _groups(name, g_idx, in_features, groups)
    if tuple(qzeros.shape) != (groups, out_features * bits // WORD_BITS):
        raise CheckpointError(f"{name}: qzeros {tuple(qzeros.shape)} do not fit scales {tuple(scales.shape)}")
    zeros = unpack_columns(qzeros, bits)
    if settings.checkpoint_format is CheckpointFormat.V1:
        zeros = _restore_v1_zeros(name, zeros, bits)
    return PackedMatrix(
        qweight=qweight,
        scales=scales.t().to(torch.float32).contiguous(),
        zeros=zeros.t().contiguous(),
        bits=bits,
        group_size=group_size,
        group_of_input=group_of_input,
    )


def _restore_v1_zeros(name: str, stored: Tensor, bits: int) -> Tensor:
    largest = (1 << bits) - 1
    if stored.numel() and int(stored.max()) == largest:
        raise CheckpointError(
            f"{name}: qzeros hold {largest}, which readers of GPTQ version 1 take for zero point 0 or {largest + 1}; "
            "quantise the source model again, or convert the file to gptq_v2"
        )
    return stored + 1


def _bits_from_shape(name: str, qweight: Tensor, g_idx: Tensor) -> int:
    """The bits of this very linear, which may differ from the model's default (mixed 4- and 8-bit checkpoints)."""
    in_features = g_idx.shape[0]
    bits = qweight.shape[0] * WORD_BITS // in_features if in_features else 0
    if bits not in PACKABLE_BITS or qweight.shape[0] * WORD_BITS != bits * in_features:
        raise CheckpointError(
            f"{name}: qweight {tuple(qweight.shape)} holds neither 4- nor 8-bit codes of {in_features} inputs"
        )
    return bits


def _groups(name: str, g_idx: Tensor | None, in_features: int, groups: int) -> tuple[int, Tensor | None]:
    """The group size, and the group of each input where groups are not runs of so many neighbours."""
    if not groups or (g_idx is None and in_features % groups):
        raise CheckpointError(f"{name}: {groups} groups of scales do not divide {in_features} inputs evenly")
    group_size = -(-in_features // groups)
    if g_idx is None:
        return group_size, None
    stored = g_idx.to(torch.int32)
    if in_features % groups == 0 and torch.equal(stored, torch.arange(in_features, dtype=torch.int32) // group_size):
        return group_size, None
    if not 0 <= int(stored.min()) <= int(stored.max()) < groups:
        raise CheckpointError(
            f"{name}: g_idx names groups {int(stored.min())}..{int(stored.max())}; scales hold 0..{groups - 1}"
        )
    return int(torch.bincount(stored).max()), stored


def locate_tensors(directory: Path) -> dict[str, Path]:
    """Which safetensors file of the directory holds each tensor.

    Files that no index names, beside a model of the usual name, are other copies of the model or none of its business.
    Raises CheckpointError for a header that does not describe its file.
    """
    return {name: path for path in _weight_files(directory) for name in check_safetensors(path).tensors}


def _weight_files(directory: Path) -> list[Path]:
    index = read_json(directory / "model.safetensors.index.json").get("weight_map")
    if isinstance(index, dict):
        named = {str(name) for name in cast("dict[str, object]", index).values()}
        return [path for path in sorted(directory.glob("*.safetensors")) if path.name in named]
    usual = directory / "model.safetensors"
    files = [usual] if usual.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} has no .safetensors file{pickled_hint(directory)}")
    return files


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file, empty if there is no such file. CheckpointError if it holds anything else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a JSON object was expected")
    return cast("dict[str, object]", content)
