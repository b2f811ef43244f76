"""The words of `causerie quantize` and `causerie merge`: flags, their help, and what was mistyped."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from quant.formats.checkpoint_format import CheckpointFormat
from quant.report.loaders import WrittenFormat, refusing_tools

DESCRIPTION = """\
Quantise a model's linears to 4 (or 8) bits with GPTQ and write a directory that `causerie serve --model OUT` and other
engines load, with a report of what it cost in quality. Works layer by layer, from and to disk; takes about two minutes
for 135M parameters on two cores. An interrupted run goes on where it was when the same command is given again."""

EXAMPLES = """\
examples:
  causerie quantize smollm2-135m-instruct ./my-model         a named model, calibrated on the bundled text
  causerie quantize ./checkpoint ./my-model --plan           only say what it would need
  causerie quantize ./checkpoint ./my-model --head-bits 8    half of what is left of a small model's file is its head
  causerie quantize ./checkpoint ./my-model --act-order      usually a little better; takes the same time
  causerie quantize ./checkpoint ./my-model --calibration chats.jsonl --max-perplexity-increase 2%
  causerie quantize ./checkpoint ./my-model --adapter ./lora the base with an adapter merged into it first
  causerie quantize Qwen/Qwen2.5-0.5B-Instruct ./qwen --asym --format v2

Calibration text should look like what the model will see: one JSON object a line, {"messages": [{"role", "content"},
...]} or {"text": "..."}, or a plain .txt file. OUT/quantization_report.md says how the result compares with the source
and with plain rounding, and which tools load it; .json is the same for programs, .png shows the error of each layer."""

MERGE_DESCRIPTION = """\
Merge a peft LoRA adapter into its base model and write the whole as a plain model directory: W + scale * B @ A for each
linear that the adapter changes. Reads only safetensors. DoRA and other variants are refused by name."""

MERGE_EXAMPLES = """\
examples:
  causerie merge ./checkpoint ./lora ./merged                then: causerie quantize ./merged ./my-model
  causerie merge smollm2-135m-instruct ./lora ./merged       a named model as the base"""

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ACT_ORDERS = ("static", "shuffled")
LARGEST_SEED = 2**63 - 1
FORMATS = {"v1": CheckpointFormat.V1, "v2": CheckpointFormat.V2}


class _Parser(argparse.ArgumentParser):
    """argparse with whole flag names only, and with the nearest one for a name that it does not know."""

    def parse_args(self, args: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        namespace, unknown = self.parse_known_args(args)
        if unknown:
            name = unknown[0].partition("=")[0]
            close = difflib.get_close_matches(name, list(self._option_string_actions), n=1)
            self.error(f"unknown argument {unknown[0]}" + (f"; did you mean {close[0]}?" if close else ""))
        return namespace


def parse_quantize(argv: Sequence[str]) -> argparse.Namespace:
    """Leaves with exit code 2 and one line for what cannot be meant."""
    parser = new_parser("causerie quantize", DESCRIPTION, EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="directory, named model (`causerie models list`) or hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write; must not exist, or be empty")
    parser.add_argument("--plan", action="store_true", help="print memory, disk and time that it would take, and leave")
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="peft LoRA adapter to merge into MODEL first (see `causerie merge`)"
    )
    _add_format(parser)
    _add_method(parser)
    _add_text(parser)
    parser.add_argument(
        "--max-perplexity-increase",
        type=_percent,
        metavar="PCT",
        help="budget, as in 2%% (or 2): linears that need it get a smaller group or 8 bits until the result keeps it "
        "on both held-out texts, smallest file first; nothing is written if even 8 bits are not enough. Takes two to "
        "three times as long; the result has mixed widths, which fewer engines load",
    )
    return parser.parse_args(_with_act_order_kind(argv))


def parse_merge(argv: Sequence[str]) -> argparse.Namespace:
    """As above."""
    parser = new_parser("causerie merge", MERGE_DESCRIPTION, MERGE_EXAMPLES)
    parser.add_argument("base", metavar="BASE", help="directory, named model or hub id that the adapter was trained on")
    parser.add_argument(
        "adapter", metavar="ADAPTER", type=Path, help="directory with adapter_config.json and adapter_model.safetensors"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write; must not exist, or be empty")
    return parser.parse_args(argv)


def act_order_warning(act_order: str, *, symmetric: bool) -> str | None:
    """Who will not load a result with this order though they load others; None where that is nobody."""
    if act_order != "shuffled":
        return None
    written = WrittenFormat(frozenset({4}), frozenset({32}), symmetric=symmetric, act_order=act_order)
    tools = ", ".join(refusing_tools(written))
    return (
        f"--act-order=shuffled: {tools} will not load the result, and our own engine runs it on its slow path; "
        "--act-order=static is loaded by all of them, and as good or nearly"
    )


def format_warning(*, symmetric: bool, checkpoint_format: CheckpointFormat) -> str | None:
    """Who will not load a result of this symmetry and version though they load others; None where that is nobody."""
    version_1, version_2 = (
        ", ".join(refusing_tools(WrittenFormat(frozenset({4}), frozenset({32}), symmetric, checkpoint_format=version)))
        for version in CheckpointFormat
    )
    if checkpoint_format is CheckpointFormat.V2:
        return f"--format v2: {version_2} will not load the result" if version_2 else None
    if symmetric:
        return None
    return f"--asym: {version_1} will not load the result; with --format v2, {version_2} will not"


def new_parser(program: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Takes whole flag names only, and answers others with the nearest one."""
    return _Parser(
        prog=program,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_format(parser: argparse.ArgumentParser) -> None:
    """What the file looks like, so who loads it."""
    group = parser.add_argument_group("format")
    group.add_argument("--bits", type=int, choices=(4, 8), default=4, help="bits of a weight (default: 4)")
    group.add_argument(
        "--eight-bit",
        type=_linear_names,
        default=(),
        metavar="NAMES",
        help="linears that get 8 bits all the same, as in q_proj,k_proj,v_proj; ones that share an input go together",
    )
    group.add_argument(
        "--group-size",
        type=_group_size,
        metavar="N",
        help="inputs that share a scale: 128, 64, 32, or -1 for all inputs of a row; smaller is better and larger in "
        "bytes (default: the largest of 128, 64, 32 that divides every layer's inputs)",
    )
    for end, hint in (
        ("head", "the table that makes logits, calibrated as the other linears are"),
        ("embedding", "rows looked up by token, each rounded as near as its grid allows"),
    ):
        group.add_argument(
            f"--{end}-bits",
            type=int,
            choices=(4, 8),
            metavar="{4,8}",
            help=f"{hint} (default: left plain); where the model has one table for both, either flag means both",
        )
    symmetry = group.add_mutually_exclusive_group()
    symmetry.add_argument(
        "--sym", action="store_true", default=True, help="zero in the middle of the grid (default; any engine loads it)"
    )
    symmetry.add_argument(
        "--asym",
        dest="sym",
        action="store_false",
        help="a zero point for each group; a little better, fewer engines load it: GPTQModel only with --format v2",
    )
    group.add_argument(
        "--format",
        type=_checkpoint_format,
        default="v1",
        metavar="v1|v2",
        help="version of AutoGPTQ's layout; any engine reads v1 (default), v2 is for asymmetric groups in GPTQModel",
    )


def _add_method(parser: argparse.ArgumentParser) -> None:
    """How the codes are found: quality and time, not the format."""
    group = parser.add_argument_group("method")
    group.add_argument(
        "--act-order",
        choices=ACT_ORDERS,
        default="none",
        metavar="KIND",
        help="quantise the inputs that matter most first. --act-order alone is --act-order=static: groups stay in "
        "order and any engine loads the result; --act-order=shuffled forms groups in that order: few engines load it",
    )
    group.add_argument(
        "--mse-search",
        choices=("on", "off"),
        default="on",
        help="choose each group's range by its squared error instead of by its extremes (default: on)",
    )
    group.add_argument(
        "--damp",
        type=_positive_float,
        default=0.01,
        metavar="SHARE",
        help="of the Hessian's mean diagonal, added to it to keep it invertible (default: 0.01)",
    )


def _add_text(parser: argparse.ArgumentParser) -> None:
    """What it is calibrated on."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help=".jsonl or .txt instead of the bundled text; conversations are rendered with the model's own chat format, "
        "and a file that holds text the result is measured on is refused",
    )
    group.add_argument("--samples", type=_positive_int, default=128, metavar="N", help="windows of text (default: 128)")
    group.add_argument(
        "--seq-len",
        type=_positive_int,
        metavar="N",
        help="tokens of a window (default: 512, or the model's context where that is shorter)",
    )
    group.add_argument("--seed", type=_seed, default=0, metavar="N", help="order of the text's rows (default: 0)")


def _with_act_order_kind(argv: Sequence[str]) -> list[str]:
    """`--act-order` alone means static; argparse would take the word after it for its value."""
    words = list(argv)
    for place, word in enumerate(words):
        if word == "--act-order" and words[place + 1 : place + 2] not in [[kind] for kind in ACT_ORDERS]:
            words[place] = "--act-order=static"
    return words


def _checkpoint_format(text: str) -> CheckpointFormat:
    if text not in FORMATS:
        _refuse(f"{text!r} is no version of the layout; give {' or '.join(FORMATS)}")
    return FORMATS[text]


def _linear_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in LINEARS:
            _refuse(f"{name!r} is no linear of a layer; these are: {', '.join(LINEARS)}")
    return names


def _group_size(text: str) -> int:
    value = _whole_number(text)
    if value != -1 and value < 1:
        _refuse(f"{value} is no group size; give 128, 64, 32, or -1 for all inputs of a row")
    return value


def _positive_int(text: str) -> int:
    value = _whole_number(text)
    if value < 1:
        _refuse(f"{value} is not positive")
    return value


def _seed(text: str) -> int:
    value = _whole_number(text)
    if not 0 <= value <= LARGEST_SEED:
        _refuse(f"{value} is no seed; give 0 to {LARGEST_SEED}")
    return value


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        _refuse(f"{text!r} is not a whole number")


def _percent(text: str) -> float:
    """`2%` and `2` are the same."""
    return _positive_float(text.strip().removesuffix("%"))


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        _refuse(f"{text!r} is not a number")
    if not 0 < value < float("inf"):
        _refuse(f"{text} is not a positive number")
    return value


def _refuse(message: str) -> NoReturn:
    raise argparse.ArgumentTypeError(message)
