"""One model directory in, one 4-bit GPTQ directory out: walk, write, read back, measure, report, publish.

Knows how to load, tokenise and serve a model only through `ModelAccess`, which `quant.commands` fills in.
"""

from __future__ import annotations

import hashlib
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from quant.calibration import (
    BUNDLED_CALIBRATION,
    BUNDLED_HELD_OUT,
    Encoder,
    Row,
    bundled_rows,
    calibration_windows,
    encode_rows,
    held_out_windows,
    load_rows,
)
from quant.errors import CheckpointError, QuantizationError
from quant.formats.autogptq import gptq_settings, read_json
from quant.formats.autogptq_check import rows_of_head_parts, stored_weight
from quant.formats.autogptq_writer import WEIGHTS_FILE, narrowed, write_checkpoint
from quant.formats.checkpoint_names import checkpoint_names
from quant.gptq import GptqOptions
from quant.int4_linear import QuantizedLinear
from quant.matrix import QuantizedMatrix
from quant.measure import Agreement, LayerTransform, MeasurableModel, PlainPath, WindowLogits, compare
from quant.model_directory import (
    DataFile,
    JsonValue,
    Manifest,
    Parent,
    hash_directory,
    publish_directory,
    read_manifest,
    write_manifest,
)
from quant.progress import ProgressSink
from quant.quantize_model import quantize_layers
from quant.report import QuantizationReport, write_report

HELD_OUT_TOKENS = 16_384
HELD_OUT_SEQ_LEN = 512
# The model in memory and the one read back do the same arithmetic on what must be the same weights.
READ_BACK_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """`calibration` None is the text that comes with the package. `max_perplexity_increase` in percent.

    `eight_bit` names linears that get 8 bits in every layer, such as `down_proj`, whatever the others get.
    """

    gptq: GptqOptions = field(default_factory=GptqOptions)
    eight_bit: tuple[str, ...] = ()
    calibration: Path | None = None
    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    max_perplexity_increase: float | None = None

    def bits_of(self, linear: str) -> int:
        """linear: a module's full name, such as `model.layers.0.mlp.down_proj`."""
        return 8 if linear.rpartition(".")[2] in self.eight_bit else self.gptq.bits


class ModelAccess(Protocol):
    """What only the packages above this one know of a model directory."""

    def load(self, directory: Path) -> MeasurableModel:
        """The decoder in its file's type."""
        ...

    def encoder(self, directory: Path) -> Encoder: ...

    def chat_format_sha256(self, directory: Path) -> str | None: ...

    def serving_logits(self, directory: Path) -> WindowLogits | None:
        """Logits on the path that serves; None where there is no such path to measure."""
        ...


@dataclass(frozen=True, slots=True)
class _Text:
    """Token windows and where they came from."""

    calibration: Tensor
    held_out: Tensor
    files: tuple[DataFile, ...]


def quantize_with(
    access: ModelAccess, source: Path, out: Path, options: QuantizeOptions, progress: ProgressSink
) -> QuantizationReport:
    """Quantise `source` into the new directory `out`, which appears whole or not at all.

    Raises QuantizationError for what cannot be done as asked, a perplexity above the limit included; CheckpointError
    for a directory that cannot be used.
    """
    started = time.monotonic()
    _refuse_unusable(source, out)
    text = _prepare_text(access.encoder(source), options)
    model = access.load(source)
    before = PlainPath(model, text.held_out, progress, "Measuring the source model")

    quantize_started = time.monotonic()
    layers = quantize_layers(model, text.calibration, options.gptq, progress, bits_of_linear=options.bits_of)
    quantize_seconds = time.monotonic() - quantize_started
    matrices = quantized_matrices(model)
    _narrow_plain_parameters(model)

    with publish_directory(out) as directory:
        progress.update("Writing", 0, 1)
        write_checkpoint(source, directory, matrices, options.gptq, layers[0].linears[0].group_size)
        progress.update("Writing", 1, 1)
        difference = check_read_back(model, directory, text.held_out[:1], progress)
        source_perplexity, plain, served = _measure(access, model, directory, text.held_out, before, progress)
        report = QuantizationReport(
            source=_name(source),
            bits=options.gptq.bits,
            eight_bit=options.eight_bit,
            group_size=layers[0].linears[0].group_size,
            symmetric=options.gptq.symmetric,
            act_order=options.gptq.act_order,
            damp=options.gptq.damp,
            calibration_tokens=text.calibration.numel(),
            held_out_tokens=text.held_out.numel(),
            source_perplexity=source_perplexity,
            plain=plain,
            served=served,
            layers=layers,
            source_bytes=_weight_bytes(source),
            quantized_bytes=_weight_bytes(directory),
            quantize_seconds=quantize_seconds,
            total_seconds=time.monotonic() - started,
            peak_memory_bytes=peak_memory_bytes(),
            largest_logit_difference=difference,
        )
        _refuse_bad_quality(report, options.max_perplexity_increase)
        write_report(directory, report)
        chat_format = access.chat_format_sha256(source)
        write_manifest(directory, _manifest(source, options, report, text, chat_format))
    return report


def quantized_matrices(model: MeasurableModel) -> dict[str, QuantizedMatrix]:
    """The matrix of every quantised linear, by its name."""
    assert isinstance(model, nn.Module)
    return {name: module.matrix for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def _narrow_plain_parameters(model: MeasurableModel) -> None:
    """As they are written, so that what is measured from here on is what is on disk."""
    assert isinstance(model, nn.Module)
    for name, parameter in model.named_parameters():
        parameter.data = narrowed(name, parameter.data)


def check_read_back(model: MeasurableModel, directory: Path, window: Tensor, progress: ProgressSink) -> float:
    """Largest difference of logits between the model in memory and the written file, read by independent code.

    window: (1, tokens) ids. Raises CheckpointError if it is more than rounding.
    """
    in_memory = PlainPath(model, window, progress, "Checking the model in memory").logits(0)
    stage = "Checking the model on disk"
    on_disk = PlainPath(model, window, progress, stage, transform=stored_layer(directory)).logits(0)
    difference = float((in_memory - on_disk).abs().max())
    if not difference <= READ_BACK_TOLERANCE * float(in_memory.abs().max()):
        raise CheckpointError(
            f"the written checkpoint does not read back as what was quantised: logits differ by {difference:.2g}; "
            "nothing was published. Please report this"
        )
    return difference


def stored_layer(directory: Path) -> LayerTransform:
    """Exchanges a layer's quantised linears for plain ones with the weights that independent code reads from disk."""
    names = checkpoint_names(read_json(directory / "config.json"))

    def transform(index: int, layer: nn.Module) -> nn.Module:
        for name, module in list(layer.named_modules()):
            if isinstance(module, QuantizedLinear):
                place = names.stored(f"model.layers.{index}.{name}")
                stored = stored_weight(directory / WEIGHTS_FILE, place.name)
                if place.part is not None:
                    stored = rows_of_head_parts(stored, place.part, names.head_dim)
                weight = torch.from_numpy(stored)
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                linear.weight = nn.Parameter(weight, requires_grad=False)
                linear.register_parameter("bias", module.bias)
                parent, _, attribute = name.rpartition(".")
                setattr(layer.get_submodule(parent), attribute, linear)
        return layer

    return transform


def peak_memory_bytes() -> int:
    """Of this process since it started."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _refuse_unusable(source: Path, out: Path) -> None:
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source} is not a model directory: it has no config.json")
    if gptq_settings(source) is not None:
        raise QuantizationError(f"{source} is quantised already; give the directory of its source weights")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise QuantizationError(f"{out} exists and is not empty; give the name of a new directory")


def _prepare_text(encode: Encoder, options: QuantizeOptions) -> _Text:
    held_out_rows = bundled_rows(BUNDLED_HELD_OUT)
    if options.calibration is None:
        rows = bundled_rows(BUNDLED_CALIBRATION)
        calibration_file = _bundled_record(BUNDLED_CALIBRATION, rows)
    else:
        rows = load_rows(options.calibration)
        digest = hashlib.sha256(options.calibration.read_bytes()).hexdigest()
        calibration_file = DataFile(options.calibration.name, digest, len(rows))
    ids = encode_rows(rows, encode, options.seed)
    return _Text(
        calibration=calibration_windows(ids, options.samples, options.seq_len),
        held_out=held_out_windows(encode_rows(held_out_rows, encode), HELD_OUT_SEQ_LEN, HELD_OUT_TOKENS),
        files=(calibration_file, _bundled_record(BUNDLED_HELD_OUT, held_out_rows)),
    )


def _bundled_record(name: str, rows: Sequence[Row]) -> DataFile:
    content = resources.files("quant").joinpath("data", name).read_bytes()
    return DataFile(name, hashlib.sha256(content).hexdigest(), len(rows))


def _measure(
    access: ModelAccess,
    model: MeasurableModel,
    directory: Path,
    windows: Tensor,
    before: PlainPath,
    progress: ProgressSink,
) -> tuple[float, Agreement, Agreement | None]:
    """The source's perplexity, and how the written model does on the plain path and on the one that serves."""
    stage = "Measuring the quantised model"
    after = PlainPath(model, windows, progress, stage, transform=stored_layer(directory))
    others = [after.logits]
    serve = access.serving_logits(directory)
    if serve is not None:
        others.append(lambda window: serve(windows[window]))
    perplexity, agreements = compare(windows, before.logits, others, progress, "Comparing predictions")
    return perplexity, agreements[0], agreements[1] if len(agreements) > 1 else None


def _refuse_bad_quality(report: QuantizationReport, limit: float | None) -> None:
    increase = report.perplexity_increase_percent
    if limit is not None and not increase <= limit:
        raise QuantizationError(
            f"perplexity rose by {increase:.2f} %, more than the {limit:g} % allowed; nothing was written. "
            "Try a smaller --group-size, --act-order, --asym, more --samples, or --bits 8"
        )


def _manifest(
    source: Path, options: QuantizeOptions, report: QuantizationReport, text: _Text, chat_format: str | None
) -> Manifest:
    gptq = options.gptq
    config: Mapping[str, JsonValue] = {
        "method": "gptq",
        "bits": gptq.bits,
        "eight_bit": list(options.eight_bit),
        "group_size": report.group_size,
        "symmetric": gptq.symmetric,
        "act_order": gptq.act_order,
        "damp": gptq.damp,
        "samples": options.samples,
        "seq_len": options.seq_len,
    }
    metrics: dict[str, JsonValue] = {
        "source_perplexity": report.source_perplexity,
        "perplexity": report.plain.perplexity,
        "top1_agreement": report.plain.top1_agreement,
        "mean_kl": report.plain.mean_kl,
        "perplexity_increase_percent": report.perplexity_increase_percent,
    }
    return Manifest(
        stage="quantize",
        parents=(Parent(_name(source), hash_directory(source)),),
        data=text.files,
        config=config,
        seed=options.seed,
        metrics=metrics,
        chat_format_sha256=chat_format,
    )


def _name(source: Path) -> str:
    """What the source's manifest calls it, else its folder's name."""
    manifest = read_manifest(source)
    name = None if manifest is None else manifest.config.get("name")
    return name if isinstance(name, str) else source.absolute().name


def _weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
