"""One model directory in, one GPTQ directory out: plan, walk, write, measure, report, publish.

Layer by layer from and to disk. Knows how to read, tokenise and serve a model only through `ModelAccess`, which
`quant.commands` fills in.
"""

from __future__ import annotations

import hashlib
import logging
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from quant.budget.attempts import OverBudgetError, keep_budget
from quant.budget.search import SearchRun, Walked
from quant.errors import CheckpointError
from quant.formats.autogptq import read_json
from quant.formats.autogptq_writer import write_checkpoint
from quant.formats.checkpoint_names import checkpoint_names
from quant.formats.tensor_files import TensorFile
from quant.heap import give_back_free_memory, large_blocks_given_back
from quant.method.settling import fastest_settling
from quant.model_directory import (
    JsonValue,
    Manifest,
    Parent,
    hash_directory,
    publish_directory,
    read_manifest,
    remove_leftovers_of,
    write_manifest,
)
from quant.options import LinearChoice, QuantizeOptions
from quant.progress import ProgressSink
from quant.report.measure import RowLogits, carry_paths
from quant.report.quantization_report import BudgetTrial, DecodeSpeed, QuantizationReport, TextComparison, write_report
from quant.run.calibration import Encoder
from quant.run.compare_texts import compare_texts
from quant.run.plan import require_room
from quant.run.refusals import refuse_unusable_source, refuse_used_name
from quant.run.texts import RunTexts, prepare_texts
from quant.walk.ends import EMBEDDINGS, HEAD, choose_ends
from quant.walk.layer_files import WorkDirectory, fingerprint, full_disk_named, open_work, other_works
from quant.walk.layer_source import LayerSource
from quant.walk.layer_walk import quantize_to_disk, refuse_damaged_ends, refuse_unfit_options, settle_group_size
from quant.walk.quantize_model import LayerReport, fast_product_dtype

logger = logging.getLogger(__name__)

__all__ = ["ModelAccess", "QuantizeOptions", "peak_memory_bytes", "quantize_with"]


class ModelAccess(Protocol):
    """What only the packages above this one know of a model directory."""

    def open(self, directory: Path) -> LayerSource:
        """A plain or a quantised decoder, layer by layer."""
        ...

    def encoder(self, directory: Path) -> Encoder: ...

    def chat_format_sha256(self, directory: Path) -> str | None: ...

    def serve_windows(self, directory: Path, windows: Tensor, progress: ProgressSink, stage: str) -> RowLogits | None:
        """Windows (count, tokens) of ids on the path that serves; None where there is no such path to measure."""
        ...

    def decode_speeds(self, directories: Sequence[Path]) -> Sequence[DecodeSpeed | None]:
        """Of the engine on each directory; None for what could not be measured."""
        ...


@dataclass(frozen=True, slots=True)
class _Run:
    """What is settled before the first layer. `options.gptq` has its group size."""

    access: ModelAccess
    source: Path
    source_sha256: str
    layers: LayerSource
    ends: Mapping[str, LinearChoice]
    options: QuantizeOptions
    texts: RunTexts
    progress: ProgressSink
    started: float  # by the monotonic clock

    @property
    def mark(self) -> str:
        """The fingerprint of everything that decides the codes."""
        options = self.options
        return fingerprint(
            {
                "source": self.source_sha256,
                "calibration": hashlib.sha256(self.texts.calibration.numpy().tobytes()).hexdigest(),
                "shape": list(self.texts.calibration.shape),
                "gptq": asdict(options.gptq),
                "eight_bit": sorted(options.eight_bit),
                "choices": {name: asdict(choice) for name, choice in options.choices.items()},
                "ends": {name: asdict(choice) for name, choice in self.ends.items()},
                "products": str(fast_product_dtype()),
                "settling": fastest_settling().name,
                "format": options.checkpoint_format,
            }
        )


@large_blocks_given_back()
def quantize_with(
    access: ModelAccess,
    source: Path,
    out: Path,
    options: QuantizeOptions,
    progress: ProgressSink,
    *,
    texts: RunTexts | None = None,
) -> QuantizationReport:
    """Quantise `source` into the new directory `out`, which appears whole or not at all.

    A run that was interrupted goes on at the layer it had reached, if source, text and options are the same.
    Where it loses more than `max_perplexity_increase`, `quant.budget.attempts` finds which linears to refine.
    Raises QuantizationError for what cannot be done as asked, a limit that cannot be kept and a full disk included;
    CheckpointError for a directory that cannot be used.
    texts: what `prepare_texts` makes of the options, if it is there already
    """
    refuse_used_name(out)
    refuse_unusable_source(source)
    run = _prepare(access, source, out, options, progress, texts)
    _mention_other_works(out, run.mark)
    names = checkpoint_names(read_json(run.source / "config.json"))
    with (
        open_work(out, run.mark, names, run.options.checkpoint_format) as work,
        full_disk_named(out, work, run.layers.num_layers),
    ):
        remove_leftovers_of(out)
        quantize_started = time.monotonic()
        base = Walked(work, _quantize(run, work))

        def make(walked: Walked, trials: Sequence[BudgetTrial]) -> QuantizationReport:
            return _make_result(run, out, walked, trials, time.monotonic() - quantize_started)

        limit = run.options.max_perplexity_increase
        if limit is None:
            return make(base, ())
        windows = [text.windows for text in run.texts.held_out]
        search = SearchRun(run.layers, base, run.texts.calibration, windows, run.options, run.progress)
        return keep_budget(search, limit, make)


def _make_result(
    run: _Run, out: Path, walked: Walked, trials: Sequence[BudgetTrial], quantize_seconds: float
) -> QuantizationReport:
    """Write, measure and publish. Raises OverBudgetError if perplexity rose by more than the options allow."""
    with publish_directory(out) as directory:
        _write(run, walked.work, directory)
        texts = _measure(run, walked.layers, directory)
        report = _report(run, walked.layers, texts, directory, quantize_seconds)
        ends = tuple(map(walked.work.end_report, run.ends))
        report = replace(report, ends=ends, budget_trials=tuple(trials))
        _refuse_bad_quality(report)
        report = _with_speeds(run, report, directory)
        write_report(directory, report)
        write_manifest(directory, _manifest(run, report))
        # Another run, with other options, may have made it meanwhile: their work directories do not exclude each other.
        refuse_used_name(out)
    return report


def peak_memory_bytes() -> int:
    """Of this process since it started."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _prepare(
    access: ModelAccess,
    source: Path,
    out: Path,
    options: QuantizeOptions,
    progress: ProgressSink,
    texts: RunTexts | None,
) -> _Run:
    started = time.monotonic()
    layers = access.open(source)
    names = checkpoint_names(read_json(source / "config.json"))
    refuse_unfit_options(layers, names, options)
    texts = texts or prepare_texts(access.encoder(source), options, layers.max_positions)
    plan = require_room(layers, options, out)
    refuse_damaged_ends(source, names)
    settled = replace(options, gptq=settle_group_size(layers, options.gptq), measures_speed=plan.measures_speed)
    ends = choose_ends(layers, settled)
    return _Run(access, source, hash_directory(source), layers, ends, settled, texts, progress, started)


def _mention_other_works(out: Path, mark: str) -> None:
    for path in other_works(out, mark):
        logger.warning("unfinished_work path=%s reason=other options, text or source: delete it if not needed", path)


def _quantize(run: _Run, work: WorkDirectory) -> list[LayerReport]:
    options = run.options
    done = work.num_done(run.layers.num_layers)
    if done:
        logger.info("quantising_goes_on layer=%d of=%d work=%s", done, run.layers.num_layers, work.path)
    calibration = run.texts.calibration
    return quantize_to_disk(run.layers, calibration, options.gptq, options.choice_of, work, run.progress, ends=run.ends)


def _write(run: _Run, work: WorkDirectory, directory: Path) -> None:
    """The result's files, from those of layers and ends; read back against them."""
    stage = "Writing"
    run.progress.update(stage, 0, 1)
    indices = range(run.layers.num_layers)
    choices: dict[str, LinearChoice] = {}
    for index in indices:
        choices.update(work.choices(index))
    choices.update(work.end_choices(run.ends))
    files = [*(work.file(index) for index in indices), *map(work.end_file, run.ends)]
    write_checkpoint(
        run.source,
        directory,
        files,
        choices,
        run.options.gptq,
        checkpoint_format=run.options.checkpoint_format,
        # Some files hold a tied head too, which nobody reads.
        left_out=(HEAD,) if run.layers.is_tied and run.ends else (),
    )
    require_same_tensors(directory, files)
    run.progress.update(stage, 1, 1)


def require_same_tensors(directory: Path, layers: Sequence[Path]) -> None:
    """Whether the result holds what the layers' files hold, which were read back by independent code.

    Raises CheckpointError for a tensor that is missing or differs.
    """
    written = {
        name: file for path in directory.glob("*.safetensors") for file in [TensorFile(path)] for name in file.tensors
    }
    for file in map(TensorFile, layers):
        for name in file.tensors:
            if name not in written or not torch.equal(written[name].read(name), file.read(name)):
                raise CheckpointError(
                    f"{name} does not read back as it was quantised; nothing was published. Please report this"
                )


def _measure(run: _Run, layers: Sequence[LayerReport], directory: Path) -> tuple[TextComparison, ...]:
    """The written model against its source on every held-out text."""
    choices = {
        linear.name: LinearChoice(linear.bits, linear.group_size) for layer in layers for linear in layer.linears
    }
    choices.update(run.ends)
    windows = torch.cat([text.windows for text in run.texts.held_out])
    stage = "Measuring source and result"
    result = run.access.open(directory)
    give_back_free_memory()  # what the walk has freed would count beside what measuring takes; so below
    paths = carry_paths(run.layers, result, choices, run.options.gptq, windows, run.progress, stage)
    served = run.access.serve_windows(directory, windows, run.progress, "Measuring as served")
    give_back_free_memory()
    return compare_texts(run.texts.held_out, paths, served, run.progress)


def _report(
    run: _Run,
    layers: Sequence[LayerReport],
    texts: tuple[TextComparison, ...],
    directory: Path,
    quantize_seconds: float,
) -> QuantizationReport:
    options = run.options
    assert options.gptq.group_size is not None
    return QuantizationReport(
        source=options.merged_from[0].name if options.merged_from else _name(run.source),
        bits=options.gptq.bits,
        eight_bit=options.eight_bit,
        group_size=options.gptq.group_size,
        symmetric=options.gptq.symmetric,
        act_order=options.gptq.act_order.value,
        damp=options.gptq.damp,
        calibration=run.texts.calibration_file,
        calibration_windows=run.texts.calibration.shape[0],
        calibration_tokens=run.texts.calibration.numel(),
        texts=texts,
        layers=layers,
        source_bytes=_weight_bytes(run.source),
        quantized_bytes=_weight_bytes(directory),
        quantize_seconds=quantize_seconds,
        total_seconds=time.monotonic() - run.started,
        peak_memory_bytes=peak_memory_bytes(),
        range_search=options.gptq.range_search,
        seed=options.seed,
        adapter=options.merged_from[1].name if options.merged_from else None,
        budget_percent=options.max_perplexity_increase,
        head_bits=_bits_of(run, EMBEDDINGS if run.layers.is_tied else HEAD),
        embedding_bits=_bits_of(run, EMBEDDINGS),
        checkpoint_format=options.checkpoint_format,
    )


def _bits_of(run: _Run, end: str) -> int | None:
    return run.ends[end].bits if end in run.ends else None


def _with_speeds(run: _Run, report: QuantizationReport, directory: Path) -> QuantizationReport:
    if not run.options.measures_speed:
        return report
    stage = "Measuring how fast it decodes"
    run.progress.update(stage, 0, 1)
    before, after = run.access.decode_speeds([run.source, directory])
    run.progress.update(stage, 1, 1)
    total_seconds = time.monotonic() - run.started
    return replace(report, source_speed=before, quantized_speed=after, total_seconds=total_seconds)


def _refuse_bad_quality(report: QuantizationReport) -> None:
    limit = report.budget_percent
    if limit is not None and not report.perplexity_increase_percent <= limit:
        raise OverBudgetError(report, limit)


def _manifest(run: _Run, report: QuantizationReport) -> Manifest:
    options, gptq = run.options, run.options.gptq
    config: Mapping[str, JsonValue] = {
        "method": "gptq",
        "bits": gptq.bits,
        "eight_bit": list(options.eight_bit),
        "head_bits": report.head_bits,
        "embedding_bits": report.embedding_bits,
        "group_size": report.group_size,
        "symmetric": gptq.symmetric,
        "act_order": gptq.act_order,
        "format": options.checkpoint_format,
        "damp": gptq.damp,
        "samples": options.samples,
        "seq_len": options.seq_len,
    }
    metrics: dict[str, JsonValue] = {
        "source_perplexity": report.texts[0].source_perplexity,
        "perplexity": report.texts[0].plain.perplexity,
        "top1_agreement": report.texts[0].plain.top1_agreement,
        "mean_kl": report.texts[0].plain.mean_kl,
        "perplexity_increase_percent": report.perplexity_increase_percent,
    }
    return Manifest(
        stage="quantize",
        parents=options.merged_from or (Parent(_name(run.source), run.source_sha256),),
        data=run.texts.files,
        config=config,
        seed=options.seed,
        metrics=metrics,
        chat_format_sha256=run.access.chat_format_sha256(run.source),
    )


def _name(source: Path) -> str:
    """What the source's manifest calls it, else its folder's name."""
    manifest = read_manifest(source)
    name = None if manifest is None else manifest.config.get("name")
    return name if isinstance(name, str) else source.absolute().name


def _weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
