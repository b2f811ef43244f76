"""`causerie quantize`, `causerie merge`, and the composition behind them: our algorithm with serving's loader, engine.

The one module of this package that imports `serving`, inside functions only.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quant.command_line import act_order_warning, format_warning, parse_merge, parse_quantize
from quant.threads import wait_without_spinning_long

if TYPE_CHECKING:
    import argparse

    import torch
    from torch import Tensor

    from quant.progress import ProgressSink
    from quant.report.measure import RowLogits
    from quant.report.quantization_report import DecodeSpeed, QuantizationReport
    from quant.run.calibration import Encoder, Row
    from quant.run.plan import Plan
    from quant.run.quantize_directory import QuantizeOptions
    from quant.run.texts import RunTexts
    from quant.walk.layer_source import LayerSource


def quantize(argv: Sequence[str]) -> int:
    """`causerie quantize MODEL OUT`: prints a summary; raises CheckpointError or QuantizationError with one line."""
    arguments = parse_quantize(argv)
    wait_without_spinning_long(os.environ)
    for warning in (
        act_order_warning(arguments.act_order, symmetric=arguments.sym),
        format_warning(symmetric=arguments.sym, checkpoint_format=arguments.format),
    ):
        if warning is not None:
            print(f"causerie: warning: {warning}", file=sys.stderr)

    from quant.convert.merge import merged_for_a_while
    from quant.errors import QuantizationError
    from quant.run.quantize_directory import quantize_with
    from quant.run.refusals import refuse_used_name
    from serving.models import cache_directory
    from serving.preparation import prepare_source

    access = ServingAccess()
    refuse_used_name(arguments.out)
    with _progress() as progress, contextlib.ExitStack() as stack:
        source = prepare_source(arguments.model, cache_directory(os.environ), progress)
        options, texts, plan = _look_ahead(access, source, arguments)
        print("\n".join(plan.lines), file=sys.stdout if arguments.plan else sys.stderr)
        if plan.refusal is not None:
            raise QuantizationError(plan.refusal)
        if arguments.plan:
            return 0
        if arguments.adapter is not None:
            merged = stack.enter_context(merged_for_a_while(source, arguments.adapter, arguments.out, progress))
            source, options = merged.directory, replace(options, merged_from=merged.parents)
        report = quantize_with(access, source, arguments.out, options, progress, texts=texts)
    print(f"{arguments.out}: {report.summary}; details in {arguments.out / 'quantization_report.md'}")
    return 0


def _look_ahead(
    access: ServingAccess, source: Path, arguments: argparse.Namespace
) -> tuple[QuantizeOptions, RunTexts, Plan]:
    """Everything that can be refused before the first layer, but for room: that is in the plan, to be printed first."""
    from quant.convert.merge import fit_adapter
    from quant.formats.autogptq import read_json
    from quant.formats.checkpoint_names import checkpoint_names
    from quant.run.plan import plan_run
    from quant.run.refusals import refuse_unusable_source
    from quant.run.texts import prepare_texts
    from quant.walk.layer_walk import fitting_seq_len, refuse_unfit_options

    refuse_unusable_source(source)
    if arguments.adapter is not None:
        fit_adapter(source, arguments.adapter)
    layers = access.open(source)
    options = _options(arguments, seq_len=arguments.seq_len or fitting_seq_len(layers))
    refuse_unfit_options(layers, checkpoint_names(read_json(source / "config.json")), options)
    texts = prepare_texts(access.encoder(source), options, layers.max_positions)
    return options, texts, plan_run(layers, options, arguments.out, merges_adapter=arguments.adapter is not None)


def merge(argv: Sequence[str]) -> int:
    """`causerie merge BASE ADAPTER OUT`: prints where it is; raises CheckpointError with one line."""
    arguments = parse_merge(argv)

    from quant.convert.merge import merge_adapter
    from serving.models import cache_directory
    from serving.preparation import prepare_source

    with _progress() as progress:
        base = prepare_source(arguments.base, cache_directory(os.environ), progress)
        merge_adapter(base, arguments.adapter, arguments.out, progress)
    print(f"{arguments.out}: {base.name} with {arguments.adapter.name} merged into it")
    return 0


def _options(arguments: argparse.Namespace, *, seq_len: int) -> QuantizeOptions:
    from quant.method.gptq import ActOrder, GptqOptions
    from quant.run.quantize_directory import QuantizeOptions

    return QuantizeOptions(
        gptq=GptqOptions(
            bits=arguments.bits,
            group_size=arguments.group_size,
            symmetric=arguments.sym,
            act_order=ActOrder(arguments.act_order),
            damp=arguments.damp,
            range_search=arguments.mse_search == "on",
        ),
        eight_bit=arguments.eight_bit,
        calibration=arguments.calibration,
        samples=arguments.samples,
        seq_len=seq_len,
        seed=arguments.seed,
        max_perplexity_increase=arguments.max_perplexity_increase,
        head_bits=arguments.head_bits,
        embedding_bits=arguments.embedding_bits,
        checkpoint_format=arguments.format,
    )


def quantize_directory(source: Path, out: Path, options: QuantizeOptions, progress: ProgressSink) -> QuantizationReport:
    """Quantise the model directory `source` into the new directory `out`, measured also on the path that serves."""
    from quant.run.quantize_directory import quantize_with

    return quantize_with(ServingAccess(), source, out, options, progress)


class ServingAccess:
    """`quant.run.quantize_directory.ModelAccess` by means of the `serving` package."""

    def open(self, directory: Path) -> LayerSource:
        from serving.model.layer_source import DirectoryLayers

        return DirectoryLayers(directory)

    def encoder(self, directory: Path) -> Encoder:
        """Conversations through the chat format; for a base model, their texts one after another."""
        from quant.errors import QuantizationError
        from serving.model.chat_format import ChatFormat, ChatFormatError, ChatMessage, NoChatTemplateError
        from serving.model.tokenizer import ModelTokenizer

        tokenizer = ModelTokenizer.load(directory)
        try:
            chat_format = ChatFormat.load(directory, tokenizer)
        except NoChatTemplateError:
            chat_format = None

        def encode(row: Row) -> Sequence[int]:
            if not row.messages:
                return tokenizer.encode_prompt(row.text)
            if chat_format is None:
                return tokenizer.encode_prompt("\n\n".join(message.content for message in row.messages) + "\n\n")
            try:
                messages = [ChatMessage(message.role, message.content) for message in row.messages]
                return chat_format.render(messages, add_generation_prompt=False)
            except ChatFormatError as error:
                raise QuantizationError(f"a calibration conversation cannot be rendered: {error}") from error

        return encode

    def chat_format_sha256(self, directory: Path) -> str | None:
        from serving.model.chat_format import ChatFormat, NoChatTemplateError
        from serving.model.tokenizer import ModelTokenizer

        try:
            return ChatFormat.load(directory, ModelTokenizer.load(directory)).sha256
        except NoChatTemplateError:
            return None

    def serve_windows(self, directory: Path, windows: Tensor, progress: ProgressSink, stage: str) -> RowLogits | None:
        from serving.engine.layered_logits import serve_windows

        return serve_windows(directory, windows, progress, stage)

    def decode_speeds(self, directories: Sequence[Path]) -> Sequence[DecodeSpeed | None]:
        from serving.engine.decode_speed import measure_in_child

        return measure_in_child(directories)


def stored_dtype(directory: Path) -> torch.dtype:
    """The type that holds every stored tensor exactly. Where all have it, loading in it only maps the file."""
    import torch
    from safetensors import safe_open

    from serving.model.weights import locate_tensors

    by_name = {"F16": torch.float16, "BF16": torch.bfloat16}
    found: torch.dtype | None = None
    file_of_tensor = locate_tensors(directory)
    for path in sorted(set(file_of_tensor.values())):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the handle is not iterable
                stored = by_name.get(file.get_slice(name).get_dtype(), torch.float32)
                found = stored if found is None else torch.promote_types(found, stored)
    return found or torch.float32


@contextlib.contextmanager
def _progress() -> Generator[ProgressSink]:
    from quant.progress import BarProgress, LineProgress

    if sys.stderr.isatty():
        with BarProgress() as bar:
            yield bar
    else:
        yield LineProgress(sys.stderr)
