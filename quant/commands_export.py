"""`causerie export`: a model directory or a named model as one GGUF file. Imports `serving` inside functions only."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quant.command_line import new_parser

if TYPE_CHECKING:
    from quant.convert.export import ExportReport

DESCRIPTION = """\
Write a model as one GGUF file for llama.cpp and Ollama. GPTQ codes are moved, not rounded again: symmetric 4 bits
become Q4_0 and 8 bits Q8_0 bit for bit, asymmetric 4 bits Q4_1. Tokenizer and chat template go into the file."""

EXAMPLES = """\
examples:
  causerie export smollm2-135m-instruct smollm2.gguf     the 4-bit model that `serve` uses, prepared first if need be
  causerie export ./my-model my-model.gguf               a directory that `causerie quantize` wrote, or a plain one
  causerie export ./my-model small.gguf --embeddings q8_0

Then `llama-server -m smollm2.gguf`, or `ollama create smollm2` with the line "FROM ./smollm2.gguf" in a Modelfile."""


def export(argv: Sequence[str]) -> int:
    """`causerie export MODEL OUT.gguf`: prints a summary; raises CheckpointError with one line."""
    arguments = _parse(argv)

    from quant.convert.export import Embeddings, export_gguf
    from quant.progress import LineProgress
    from serving.model.chat_template import find_template
    from serving.model.weights import load_spec
    from serving.models import cache_directory, resolve
    from serving.preparation import prepare_model

    progress = LineProgress(sys.stderr)
    directory = resolve(arguments.model).directory
    if directory is None:
        directory = prepare_model(arguments.model, cache_directory(os.environ), progress)
    load_spec(directory)  # refuses every option that would change the logits
    report = export_gguf(
        directory,
        arguments.out,
        progress,
        chat_template=find_template(directory),
        embeddings=Embeddings(arguments.embeddings),
        float16_bits=(8,) if arguments.eight_bit_as == "f16" else (),
    )
    print(_summary(report, arguments.out))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("causerie export", DESCRIPTION, EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="directory, named model (`causerie models list`) or hub id")
    parser.add_argument("out", metavar="OUT.gguf", type=Path, help="file to write; must not exist")
    parser.add_argument(
        "--embeddings",
        choices=("as-stored", "q8_0"),
        default="as-stored",
        help="embeddings and head: as the directory has them (default), or rounded to 8 bits, half the size",
    )
    parser.add_argument(
        "--eight-bit-as",
        choices=("q8_0", "f16"),
        default="q8_0",
        help="linears of 8 bits: bit for bit (default), or twice as large and nearer to what `serve` computes, since "
        "llama.cpp rounds what it multiplies by Q8_0 to 8 bits too",
    )
    return parser.parse_args(argv)


def _summary(report: ExportReport, out: Path) -> str:
    types = ", ".join(f"{count} {name}" for name, count in sorted(report.num_of_type.items()) if count)
    return "\n".join((f"{out}: {report.file_bytes / 1e6:,.0f} MB, matrices: {types}", *report.notes))
