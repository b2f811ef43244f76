"""The walk from and to disk: each layer, and each table of the vocabulary, read, quantised, written to the work
directory and let go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from quant.errors import QuantizationError
from quant.formats.autogptq import locate_tensors
from quant.formats.checkpoint_names import CheckpointNames
from quant.formats.tensor_files import TensorFile, as_stored, runs_of
from quant.heap import give_back_free_memory
from quant.int4_linear import QuantizedLinear
from quant.method.gptq import GptqOptions, choose_group_size
from quant.method.matrix import QuantizedMatrix
from quant.options import DEFAULT_SEQ_LEN, LinearChoice, QuantizeOptions
from quant.progress import ProgressSink
from quant.walk.ends import EMBEDDINGS, HEAD, count_lookups, quantize_table, rows_of_run
from quant.walk.layer_files import WorkDirectory
from quant.walk.layer_source import LayerSource
from quant.walk.quantize_model import (
    QUANTIZE_STAGE,
    CalibrationWalk,
    ChoiceOfLinear,
    LayerReport,
    embed_in_batches,
    fast_product_dtype,
    input_sizes,
)
from quant.walk.tables import Table
from quant.walk.waiting import waiting_activations


def settle_group_size(source: LayerSource, options: GptqOptions) -> GptqOptions:
    """One group size for the whole model. QuantizationError if it does not divide every linear's inputs."""
    sizes = input_sizes([source.outline()])
    return replace(options, group_size=choose_group_size(sizes, options.group_size))


def fitting_seq_len(source: LayerSource) -> int:
    """Tokens of a calibration window where none are asked for: the usual number, or the model's context if shorter."""
    return min(DEFAULT_SEQ_LEN, source.max_positions)


def refuse_unfit_options(source: LayerSource, names: CheckpointNames, options: QuantizeOptions) -> None:
    """Raises QuantizationError for windows longer than the model's context, for names in `eight_bit` that the layers
    lack, and where linears that are stored as one would get several grids."""
    if options.seq_len > source.max_positions:
        raise QuantizationError(
            f"--seq-len {options.seq_len:,} is longer than the model's context of {source.max_positions:,} tokens, "
            "behind which its activations are not what it was trained on; give at most that"
        )
    linears = {
        name.rpartition(".")[2] for name, part in source.outline().named_modules() if isinstance(part, nn.Linear)
    }
    absent = [name for name in options.eight_bit if name not in linears]
    if absent:
        raise QuantizationError(
            f"--eight-bit {absent[0]}: this model has no such linear; it has {', '.join(sorted(linears))}"
        )
    for stored, parts in names.fused.items():
        for index in range(source.num_layers):
            choices = {name.rpartition(".")[2]: options.choice_of(name.format(index)) for name in parts}
            if len(set(choices.values())) > 1:
                found = ", ".join(f"{name} {choice.bits}" for name, choice in choices.items())
                raise QuantizationError(
                    f"this family stores {', '.join(choices)} as one linear ({stored.format(index)}), which has one "
                    f"grid, and their bits would be {found}; name all of them in --eight-bit, or none"
                )


def refuse_damaged_ends(directory: Path, names: CheckpointNames) -> None:
    """Raises QuantizationError naming a tensor outside the layers that holds what is no number: the head and the final
    norm would else only be met when everything is quantised, a row of the embeddings perhaps never. Reads them once."""
    for stored, path in locate_tensors(directory).items():
        if names.is_derived(stored) or names.ours(stored)[0].startswith("model.layers."):
            continue
        tensor = as_stored(TensorFile(path), stored)
        if tensor.dtype.is_floating_point and not all(bool(run.isfinite().all()) for run in runs_of(tensor)):
            raise QuantizationError(
                f"{stored} holds values that are not finite (NaN or infinity); the source is damaged"
            )


def quantize_to_disk(
    source: LayerSource,
    calibration: Tensor,
    options: GptqOptions,
    choice_of: ChoiceOfLinear,
    work: WorkDirectory,
    progress: ProgressSink,
    ends: Mapping[str, LinearChoice] | None = None,
) -> list[LayerReport]:
    """Quantise the layers that are not done yet; calibration activations pass through those that are.

    calibration: (samples, tokens) ids. options: with their group size settled.
    ends:        tables of the vocabulary to quantise too (`quant.walk.ends.choose_ends`)
    Raises QuantizationError naming layer and module for values that are not finite.
    """
    num_layers, ends = source.num_layers, ends or {}
    reports: list[LayerReport] = []
    if work.num_done(num_layers) == num_layers and all(map(work.has_end, ends)):
        return [work.report(index) for index in range(num_layers)]
    with torch.inference_mode(), waiting_activations(work.path) as waiting:
        embedded = _embed(source, calibration, _settle_first_end(source, options, ends, work))
        rotary = source.rotary(torch.arange(calibration.shape[1]))
        walk = CalibrationWalk(embedded, rotary, waiting, options, choice_of)
        del embedded
        for index in range(num_layers):
            progress.update(QUANTIZE_STAGE, index, num_layers)
            # A layer leaves a quarter of its peak as gaps; where the next one's blocks do not fit, they would add up.
            give_back_free_memory()
            reports.append(_settle_layer(source, index, walk, work))
        _settle_last_end(source, walk, options, ends, work)
    progress.update(QUANTIZE_STAGE, num_layers, num_layers)
    return reports


def _embed(source: LayerSource, calibration: Tensor, table: Table | None) -> Tensor:
    """(samples, tokens) ids -> (samples, tokens, hidden). table: instead of the source's own."""
    embedded = embed_in_batches(lambda ids: source.embed(ids, table), calibration, fast_product_dtype())
    if not bool(embedded.isfinite().all()):
        raise QuantizationError("model.embed_tokens holds values that are not finite (NaN or infinity)")
    return embedded


def _settle_first_end(
    source: LayerSource, options: GptqOptions, ends: Mapping[str, LinearChoice], work: WorkDirectory
) -> Table | None:
    """Embeddings of their own come first, so that all that follows is calibrated on what is left of them."""
    if EMBEDDINGS not in ends or source.is_tied:
        return None
    if not work.has_end(EMBEDDINGS):
        _settle_end(source, EMBEDDINGS, None, options, ends, work)
    return work.end_table(EMBEDDINGS)


def _settle_last_end(
    source: LayerSource,
    walk: CalibrationWalk,
    options: GptqOptions,
    ends: Mapping[str, LinearChoice],
    work: WorkDirectory,
) -> None:
    name = EMBEDDINGS if source.is_tied else HEAD
    if name in ends and not work.has_end(name):
        hessian = walk.hessian_after(source.final_norm)
        _settle_end(source, name, count_lookups(hessian) if source.is_tied else hessian, options, ends, work)


def _settle_end(
    source: LayerSource,
    name: str,
    hessian: Tensor | None,
    options: GptqOptions,
    ends: Mapping[str, LinearChoice],
    work: WorkDirectory,
) -> None:
    grid = replace(options, bits=ends[name].bits, group_size=ends[name].group_size)
    run_rows = rows_of_run(source.outline(), source.hidden_size)
    matrix, report = quantize_table(name, source.table(name), hessian, grid, run_rows)
    work.write_end(report, matrix)


def _settle_layer(source: LayerSource, index: int, walk: CalibrationWalk, work: WorkDirectory) -> LayerReport:
    layer = source.layer(index)
    if work.has(index):
        insert_matrices(layer, f"model.layers.{index}", work.matrices(index))
        walk.pass_through(index, layer)
        return work.report(index)
    report = walk.quantize_layer(index, layer)
    work.write(report, matrices_of(layer, f"model.layers.{index}"))
    return report


def matrices_of(layer: nn.Module, prefix: str) -> dict[str, QuantizedMatrix]:
    """The matrix of every quantised linear, by its full name."""
    return {
        f"{prefix}.{name}": module.matrix
        for name, module in layer.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def insert_matrices(layer: nn.Module, prefix: str, matrices: Mapping[str, QuantizedMatrix]) -> None:
    """Put `QuantizedLinear`s where the plain linears of these full names are; biases stay."""
    for full_name, matrix in matrices.items():
        name = full_name.removeprefix(f"{prefix}.")
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        parent, _, attribute = name.rpartition(".")
        setattr(layer.get_submodule(parent), attribute, QuantizedLinear(matrix, linear.bias))
