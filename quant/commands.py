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

if TYPE_CHECKING:
    import argparse

    import torch
    from torch import Tensor

    from quant.calibration import Encoder, Row
    from quant.layer_source import LayerSource
    from quant.measure import WindowLogits
    from quant.progress import ProgressSink
    from quant.quantize_directory import QuantizeOptions
    from quant.report import DecodeSpeed, QuantizationReport


SEARCH_COST = "if that misses the perplexity budget, the search for one that keeps it takes about four times as long"


def quantize(argv: Sequence[str]) -> int:
    """`causerie quantize MODEL OUT`: prints a summary; raises CheckpointError or QuantizationError with one line."""
    arguments = parse_quantize(argv)
    for warning in (
        act_order_warning(arguments.act_order, symmetric=arguments.sym),
        format_warning(symmetric=arguments.sym, checkpoint_format=arguments.format),
    ):
        if warning is not None:
            print(f"causerie: warning: {warning}", file=sys.stderr)

    from quant.merge import merged_for_a_while
    from quant.plan import plan_run
    from serving.models import cache_directory
    from serving.preparation import prepare_source

    options = _options(arguments)
    with _progress() as progress, contextlib.ExitStack() as stack:
        source = prepare_source(arguments.model, cache_directory(os.environ), progress)
        if arguments.adapter is not None:
            merged = stack.enter_context(merged_for_a_while(source, arguments.adapter, arguments.out, progress))
            source, options = merged.directory, replace(options, merged_from=merged.parents)
        plan = plan_run(ServingAccess().open(source), options, arguments.out)
        print("\n".join(plan.lines), file=sys.stdout if arguments.plan else sys.stderr)
        if options.max_perplexity_increase is not None:
            print(SEARCH_COST, file=sys.stdout if arguments.plan else sys.stderr)
        if arguments.plan:
            return 0
        report = quantize_directory(source, arguments.out, options, progress)
    print(f"{arguments.out}: {report.summary}; details in {arguments.out / 'quantization_report.md'}")
    return 0


def merge(argv: Sequence[str]) -> int:
    """`causerie merge BASE ADAPTER OUT`: prints where it is; raises CheckpointError with one line."""
    arguments = parse_merge(argv)

    from quant.merge import merge_adapter
    from serving.models import cache_directory
    from serving.preparation import prepare_source

    with _progress() as progress:
        base = prepare_source(arguments.base, cache_directory(os.environ), progress)
        merge_adapter(base, arguments.adapter, arguments.out, progress)
    print(f"{arguments.out}: {base.name} with {arguments.adapter.name} merged into it")
    return 0


def _options(arguments: argparse.Namespace) -> QuantizeOptions:
    from quant.gptq import ActOrder, GptqOptions
    from quant.quantize_directory import QuantizeOptions

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
        seq_len=arguments.seq_len,
        seed=arguments.seed,
        max_perplexity_increase=arguments.max_perplexity_increase,
        head_bits=arguments.head_bits,
        embedding_bits=arguments.embedding_bits,
        checkpoint_format=arguments.format,
    )


def quantize_directory(source: Path, out: Path, options: QuantizeOptions, progress: ProgressSink) -> QuantizationReport:
    """Quantise the model directory `source` into the new directory `out`, measured also on the path that serves."""
    from quant.quantize_directory import quantize_with

    return quantize_with(ServingAccess(), source, out, options, progress)


class ServingAccess:
    """`quant.quantize_directory.ModelAccess` by means of the `serving` package."""

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

    def serving_logits(self, directory: Path) -> WindowLogits | None:
        import torch

        from serving.engine.logits import serving_logits
        from serving.engine.prepare import prepare
        from serving.model.weights import load_decoder

        prepared = prepare(load_decoder(directory, dtype=torch.bfloat16), exact=False)

        def logits(ids: Tensor) -> Tensor:
            return serving_logits(prepared, ids)

        return logits

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
