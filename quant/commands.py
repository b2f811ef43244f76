"""`causerie quantize`, and the composition behind it: this package's algorithm with `serving`'s loader and engine.

The one module of this package that imports `serving`, inside functions only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quant.calibration import Encoder, Row
    from quant.layer_source import LayerSource
    from quant.measure import WindowLogits
    from quant.progress import ProgressSink
    from quant.quantize_directory import QuantizeOptions
    from quant.report import QuantizationReport

DESCRIPTION = """\
Quantise a model's linears to 4 (or 8) bits with GPTQ and write a directory that `causerie serve --model OUT` and other
engines load, with a report of what it cost in quality. Takes about two minutes for 135M parameters on two cores."""

EXAMPLES = """\
examples:
  causerie quantize smollm2-135m-instruct ./my-model         a named model, calibrated on the bundled text
  causerie quantize ./checkpoint ./my-model --act-order      usually a little better; takes the same time
  causerie quantize ./checkpoint ./my-model --calibration chats.jsonl --max-perplexity-increase 3
  causerie quantize Qwen/Qwen2.5-0.5B-Instruct ./qwen --asym --group-size 32

Calibration text should look like what the model will see: one JSON object a line, {"messages": [{"role", "content"},
...]} or {"text": "..."}, or a plain .txt file. OUT/quantization_report.md says how the result compares with the source.
vLLM loads symmetric results only."""


def quantize(argv: Sequence[str]) -> int:
    """`causerie quantize MODEL OUT`: prints a summary; raises CheckpointError or QuantizationError with one line."""
    arguments = _parse(argv)

    from quant.gptq import ActOrder, GptqOptions
    from quant.quantize_directory import QuantizeOptions
    from serving.models import cache_directory
    from serving.preparation import prepare_source

    options = QuantizeOptions(
        gptq=GptqOptions(
            bits=arguments.bits,
            group_size=arguments.group_size,
            symmetric=arguments.sym,
            act_order=ActOrder(arguments.act_order),
            damp=arguments.damp,
        ),
        eight_bit=arguments.eight_bit,
        calibration=arguments.calibration,
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        seed=arguments.seed,
        max_perplexity_increase=arguments.max_perplexity_increase,
    )
    with _progress() as progress:
        source = prepare_source(arguments.model, cache_directory(os.environ), progress)
        report = quantize_directory(source, arguments.out, options, progress)
    print(f"{arguments.out}: {report.summary}; details in {arguments.out / 'quantization_report.md'}")
    return 0


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


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="causerie quantize",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="directory, named model (`causerie models list`) or hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write; must not exist, or be empty")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="bits of a weight (default: 4)")
    parser.add_argument(
        "--eight-bit",
        type=_linear_names,
        default=(),
        metavar="NAMES",
        help="linears that get 8 bits all the same, as in q_proj,k_proj,v_proj; ones that share an input go together",
    )
    parser.add_argument(
        "--group-size",
        type=_group_size,
        metavar="N",
        help="inputs that share a scale (default: the largest of 128, 64, 32 that divides every layer's inputs; "
        "-1: all of them)",
    )
    symmetry = parser.add_mutually_exclusive_group()
    symmetry.add_argument(
        "--sym", action="store_true", default=True, help="zero in the middle of the grid (default; any engine loads it)"
    )
    symmetry.add_argument(
        "--asym", dest="sym", action="store_false", help="a zero point for each group; a little better, fewer engines"
    )
    parser.add_argument(
        "--act-order",
        choices=("none", "static", "shuffled"),
        default="none",
        help="quantise the inputs that matter most first; alone or `=static`: groups stay in order, any engine loads "
        "it; `=shuffled`: groups follow that order, which vLLM on a CPU and llama.cpp do not load",
    )
    parser.add_argument(
        "--damp", type=_positive_float, default=0.01, metavar="SHARE", help="of the mean Hessian diagonal (0.01)"
    )
    parser.add_argument("--calibration", type=Path, metavar="FILE", help=".jsonl or .txt instead of the bundled text")
    parser.add_argument("--samples", type=_positive_int, default=128, metavar="N", help="calibration samples (128)")
    parser.add_argument("--seq-len", type=_positive_int, default=512, metavar="N", help="tokens of a sample (512)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="order of the calibration text (0)")
    parser.add_argument(
        "--max-perplexity-increase",
        type=_positive_float,
        metavar="PCT",
        help="write nothing and exit with 1 if held-out perplexity rises by more",
    )
    # Alone it means static. Left to argparse, an optional value would swallow the MODEL that follows.
    return parser.parse_args(["--act-order=static" if word == "--act-order" else word for word in argv])


def _linear_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    known = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is no linear of a layer; these are: {', '.join(known)}")
    return names


def _group_size(text: str) -> int:
    value = int(text)
    if value < 1 and value != -1:
        raise argparse.ArgumentTypeError(f"{value} is neither positive nor -1 (one group over all inputs)")
    return value


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


@contextlib.contextmanager
def _progress() -> Generator[ProgressSink]:
    from quant.progress import BarProgress, LineProgress

    if sys.stderr.isatty():
        with BarProgress() as bar:
            yield bar
    else:
        yield LineProgress(sys.stderr)
