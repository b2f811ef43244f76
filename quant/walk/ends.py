"""The two ends of a model, embeddings and head, in 8 or 4 bits: which of them, how, and what rounding alone gives.

A head is a linear, so GPTQ quantises it on the hidden states that leave the final norm. Embeddings are looked up, not
multiplied: they have no such inputs, and each row is brought as near to itself as its grid allows. A tied table is
both. All of it works on runs of rows, so that no table is in memory in float32.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn

from quant.errors import QuantizationError
from quant.method.gptq import ActOrder, GptqOptions, quantize_matrix, round_to_nearest
from quant.method.matrix import QuantizedMatrix, take_outputs
from quant.method.packing import codes_per_word
from quant.options import LinearChoice, QuantizeOptions
from quant.walk.layer_source import LayerSource
from quant.walk.quantize_model import LinearReport
from quant.walk.tables import CodedTable, Table

EMBEDDINGS: Final = "model.embed_tokens"
HEAD: Final = "lm_head"
# With fewer rows, inverting the Hessian anew for each run would be most of the work.
FEWEST_ROWS: Final = 2048
# What a tied table's own values weigh beside its logits. In 4 bits it costs SmolLM2-135M about 3.5 % of perplexity
# with this share, 4.1 % with none, and 15 % where values alone count.
LOOKUP_SHARE: Final = 0.1
_PARTS: Final = ("codes", "scales", "zeros")


def choose_ends(source: LayerSource, options: QuantizeOptions) -> dict[str, LinearChoice]:
    """Bits and group size of the tables to quantise, by our decoder's names; a tied one is the embeddings.

    options: with their group size settled
    Raises QuantizationError if a tied table is to have two widths, or the vocabulary does not fill whole words.
    """
    head, embeddings = options.head_bits, options.embedding_bits
    if source.is_tied:
        if head is not None and embeddings is not None and head != embeddings:
            raise QuantizationError(
                f"head and embeddings of this model are one table, which cannot have {head} bits and {embeddings} bits "
                "at once; give --head-bits and --embedding-bits the same value, or one of them alone"
            )
        head, embeddings = None, embeddings or head
    wanted = {EMBEDDINGS: embeddings, HEAD: head}
    chosen = {name: LinearChoice(bits, options.gptq.group_size) for name, bits in wanted.items() if bits is not None}
    for name, choice in chosen.items():
        if source.vocab_size % codes_per_word(choice.bits):
            raise QuantizationError(
                f"{name} has {source.vocab_size} rows, which do not fill whole words of {codes_per_word(choice.bits)} "
                f"codes of {choice.bits} bits; leave it plain, or give it 8 bits if they are a multiple of 4"
            )
    return chosen


def rows_of_run(outline: nn.Module, hidden: int) -> int:
    """Rows of a table to quantise at a time: about as many weights as a layer's largest linear, no more memory."""
    largest = max(module.weight.numel() for module in outline.modules() if isinstance(module, nn.Linear))
    return max(FEWEST_ROWS, largest // hidden)


def count_lookups(hessian: Tensor) -> Tensor:
    """The Hessian of a tied table: that of the head, and a share of its mean diagonal for each value looked up.

    Without it an input that the head does not see would count for nothing, and be lost to the embeddings.
    hessian: (hidden, hidden) float32, changed in place and returned
    """
    hessian.diagonal().add_(LOOKUP_SHARE * float(hessian.diagonal().mean()))
    return hessian


def quantize_table(
    name: str, table: Table, hessian: Tensor | None, options: GptqOptions, run_rows: int
) -> tuple[QuantizedMatrix, LinearReport]:
    """A head on its inputs' Hessian, (hidden, hidden) float32; embeddings, without one, each row as near as possible.

    The report's error is that of the logits, else that of the values themselves, squared and relative.
    options: with the table's bits and group size
    Raises QuantizationError for values that are not finite.
    """
    if hessian is None:
        # GPTQ without interaction of inputs: rounding, its scales then fitted to the codes (`quant.method.refine`).
        hessian, options = torch.eye(table.shape[1]), replace(options, act_order=ActOrder.NONE)
    wrong = whole = damp = 0.0

    def quantized_runs() -> Generator[QuantizedMatrix]:
        nonlocal wrong, whole, damp
        for rows in _runs(table, run_rows):
            try:
                result = quantize_matrix(rows, hessian, options)
            except QuantizationError as error:
                raise QuantizationError(f"{name}: {error}") from error
            power = float((rows @ hessian).mul_(rows).sum())
            wrong, whole, damp = wrong + result.error * power, whole + power, result.damp
            yield result.matrix

    matrix = _stack(quantized_runs(), table.shape[0])
    group_size = options.group_size or matrix.group_size  # -1 stays -1
    return matrix, LinearReport(name, options.bits, group_size, wrong / whole if whole else 0.0, damp)


def round_table(table: Table, options: GptqOptions, run_rows: int) -> CodedTable:
    """Every value to the nearest code of its grid: what `quantize_table` is measured against."""
    return coded_table(_stack((round_to_nearest(rows, options) for rows in _runs(table, run_rows)), table.shape[0]))


def coded_table(matrix: QuantizedMatrix) -> CodedTable:
    """`matrix` to read rows of."""
    return CodedTable(lambda outputs: take_outputs(matrix, outputs), (matrix.out_features, matrix.in_features))


@dataclass(frozen=True, slots=True)
class RoundedEnds:
    """A source whose tables are rounded where `tables` has one, for the baseline: see `quant.report.measure.Ends`."""

    source: LayerSource
    tables: Mapping[str, Table]

    def embed(self, ids: Tensor) -> Tensor:
        return self.source.embed(ids, self.tables.get(EMBEDDINGS))

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.source.rotary(positions)

    def final_norm(self, hidden: Tensor) -> Tensor:
        return self.source.final_norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.source.logits(hidden, self.tables.get(EMBEDDINGS if self.source.is_tied else HEAD))


@dataclass(frozen=True, slots=True)
class SharedHead:
    """A result whose head makes of everything what its source's does: one of the two is held."""

    result: LayerSource
    source: LayerSource

    def embed(self, ids: Tensor) -> Tensor:
        return self.result.embed(ids)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.result.rotary(positions)

    def final_norm(self, hidden: Tensor) -> Tensor:
        return self.result.final_norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.source.logits(hidden)


def share_head(result: LayerSource, source: LayerSource) -> LayerSource | SharedHead:
    """`result` with its source's head, if the two are equal to the bit; else as it is."""
    run_rows = rows_of_run(source.outline(), source.hidden_size)
    tables = [layers.table(EMBEDDINGS if layers.is_tied else HEAD) for layers in (result, source)]
    same = all(map(torch.equal, *(_runs(table, run_rows) for table in tables)))
    return SharedHead(result, source) if same else result


def round_ends(source: LayerSource, choices: Mapping[str, LinearChoice], options: GptqOptions) -> RoundedEnds:
    """choices: bits and group size of what is quantised, by our decoder's names; only the tables' are looked at."""
    run_rows = rows_of_run(source.outline(), source.hidden_size)
    tables: dict[str, Table] = {}
    for name in (EMBEDDINGS, HEAD):
        if name in choices:
            grid = replace(options, bits=choices[name].bits, group_size=choices[name].group_size)
            tables[name] = round_table(source.table(name), grid, run_rows)
    return RoundedEnds(source, tables)


def _runs(table: Table, run_rows: int) -> Generator[Tensor]:
    num_rows = table.shape[0]
    for first in range(0, num_rows, run_rows):
        yield table.rows(first, min(first + run_rows, num_rows))


def _stack(runs: Iterable[QuantizedMatrix], num_rows: int) -> QuantizedMatrix:
    """One matrix of `num_rows` outputs, filled run by run: joined at the end they would be in memory twice."""
    whole: QuantizedMatrix | None = None
    filled = 0
    for run in runs:
        if whole is None:
            whole = replace(
                run, **{part: getattr(run, part).new_empty((num_rows, getattr(run, part).shape[1])) for part in _PARTS}
            )
        for part in _PARTS:
            getattr(whole, part)[filled : filled + run.out_features] = getattr(run, part)
        filled += run.out_features
    assert whole is not None
    assert filled == num_rows
    return whole
