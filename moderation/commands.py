"""`causerie moderate`, `causerie moderation report` and `causerie train moderation`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moderation.errors import ModerationError

if TYPE_CHECKING:
    from moderation.policy import Policy, Verdict
    from moderation.report import Report
    from quant.progress import ProgressSink

__all__ = ["moderate", "report", "train_moderation"]

MODERATE_EXAMPLES = """\
examples:
  causerie moderate "how do I kill a Python process"
  causerie moderate --file letter.txt --json --preset strict
  echo "some text" | causerie moderate -

The exit code is 0 whether the text is flagged or not; the verdict is on standard output."""

REPORT_EXAMPLES = """\
examples:
  causerie moderation report --data ./data --out ./report
  CAUSERIE_DATA=./data causerie moderation report

DIR holds moderation/, sft/val, prompts/val and licences.json. Writes report.json, PNGs and the model card README.md.
Test files are only reported on. Needs the extra `train`."""

TRAIN_EXAMPLES = """\
examples:
  causerie train moderation --data ./data --out ./my-weights
  CAUSERIE_DATA=./data causerie train moderation --out ./my-weights --licences all --ngrams-only

DIR holds moderation/, sft/, prompts/, preference/, pretrain/ and licences.json. Needs the extra `train`; the encoder
takes hours on a small machine and goes on where it was interrupted, --ngrams-only takes minutes. Weights that fall by
more than a point on a test file do not replace others. OUT/README.md says how good the result is."""


def moderate(argv: Sequence[str]) -> int:
    """`causerie moderate [TEXT | --file F]`: one verdict. Raises ModerationError with one line."""
    arguments = _parse_moderate(argv)

    from moderation.policy import PolicyOptions, Sensitivity, load_policy

    text = _read_text(arguments)
    options = PolicyOptions(input=Sensitivity(arguments.preset, arguments.threshold))
    policy = load_policy(arguments.weights, options=options)
    (verdict,) = policy.judge_texts([text])
    print(_as_json(policy, verdict) if arguments.json else _as_line(verdict))
    return 0


def report(argv: Sequence[str]) -> int:
    """`causerie moderation report`: judges the test files and writes the model card with its plots."""
    arguments = _parse_report(argv)

    from moderation.classifier import shipped_weights
    from moderation.evaluate import evaluate_policy
    from moderation.plots import check_plots_possible
    from moderation.policy import load_policy
    from moderation.publish import read_card_facts, write_report

    weights = arguments.weights or shipped_weights()
    out = arguments.out or weights
    data = arguments.data or _data_from_environment()
    # What can stop the writing is asked before minutes of judging.
    check_plots_possible()
    read_card_facts(weights)
    with _progress() as progress:
        found = evaluate_policy(load_policy(weights), data, progress)
    names = write_report(found, weights, out)
    print(_summary(found, f"wrote {', '.join(names)} in {out}"))
    return 0


def train_moderation(argv: Sequence[str]) -> int:
    """`causerie train moderation`: writes a weights directory and prints its figures."""
    arguments = _parse_train(argv)

    from moderation.classifier import shipped_weights
    from moderation.plots import check_plots_possible
    from moderation.train import TrainOptions, train_moderation
    from moderation.train_encoder import EncoderOptions

    data = arguments.data or _data_from_environment()
    out = arguments.out or shipped_weights()
    options = TrainOptions(
        data=data,
        out=out,
        licences=arguments.licences,
        seed=arguments.seed,
        encoder=None if arguments.ngrams_only else EncoderOptions(seed=arguments.seed),
        trunk=arguments.trunk,
        checkpoint=arguments.checkpoint,
        accept_falls=arguments.accept_falls,
    )
    check_plots_possible()
    with _progress() as progress:
        found = train_moderation(options, progress)
    print(_summary(found, f"wrote {out}"))
    return 0


def _parse_moderate(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="causerie moderate",
        description="Judge a text with the classifier that guards the server.",
        epilog=MODERATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("text", nargs="?", metavar="TEXT", help="the text itself; - reads standard input")
    source.add_argument("--file", type=Path, metavar="F", help="a UTF-8 text file; - reads standard input")
    parser.add_argument("--json", action="store_true", help="print the verdict as one JSON object")
    parser.add_argument(
        "--preset", choices=("strict", "balanced", "lenient"), default="balanced", help="how soon to flag (balanced)"
    )
    parser.add_argument("--threshold", type=float, metavar="P", help="flag from this probability on, not the preset's")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="weights to use instead of the shipped ones")
    return parser.parse_args(argv)


def _parse_report(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="causerie moderation report",
        description="Measure the moderation classifier on every test file and write its model card.",
        epilog=REPORT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--weights", type=Path, metavar="DIR", help="weights to measure instead of the shipped ones")
    parser.add_argument("--data", type=Path, metavar="DIR", help="data directory; default is CAUSERIE_DATA")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default is beside the weights")
    return parser.parse_args(argv)


def _parse_train(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="causerie train moderation",
        description="Train the moderation classifier, n-grams and encoder, and report on every test file.",
        epilog=TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="data directory; default is CAUSERIE_DATA")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default replaces the shipped weights")
    parser.add_argument(
        "--licences",
        choices=("yes", "all"),
        default="yes",
        help="yes: only sources whose weights may be shipped (default); all: for experiments, said in the manifest",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same weights (0)")
    parser.add_argument("--ngrams-only", action="store_true", help="leave the encoder out")
    parser.add_argument(
        "--trunk", type=Path, metavar="FILE", help="pretrained weights of the encoder, not the package's"
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="where the encoder's training is kept")
    parser.add_argument(
        "--accept-falls", action="store_true", help="replace weights even if a test file falls by more than a point"
    )
    return parser.parse_args(argv)


def _read_text(arguments: argparse.Namespace) -> str:
    if arguments.text is not None and arguments.text != "-":
        return arguments.text
    try:
        from_stdin = arguments.text == "-" or str(arguments.file) == "-"
        content = sys.stdin.buffer.read() if from_stdin else arguments.file.read_bytes()
    except OSError as error:
        raise ModerationError(f"{arguments.file} cannot be read: {error.strerror}") from None
    # Bytes that are no UTF-8 must not let the rest of the text go unjudged.
    return content.decode("utf-8", "replace")


def _as_json(policy: Policy, verdict: Verdict) -> str:
    record = {
        "model": policy.model_id,
        "flagged": verdict.flagged,
        "reason": verdict.reason,
        "language": verdict.language,
        "probability": verdict.probability,
        "threshold": verdict.threshold,
        "categories": verdict.categories,
        "category_scores": verdict.category_scores,
        "extension_scores": verdict.extension_scores,
        "trained_categories": [category.value for category in policy.trained_categories],
    }
    return json.dumps(record, ensure_ascii=False)


def _as_line(verdict: Verdict) -> str:
    word, side = ("flagged", "at or above") if verdict.flagged else ("not flagged", "below")
    return f"{word}: probability {verdict.probability:.4f}, {side} the threshold {verdict.threshold:.4f}"


def _data_from_environment() -> Path:
    data = os.environ.get("CAUSERIE_DATA")
    if not data:
        raise ModerationError("no data directory; name it with --data DIR or the environment variable CAUSERIE_DATA")
    return Path(data)


def _summary(found: Report, written: str) -> str:
    lines = [f"{written}: {found.model}"]
    for ordinary in found.ordinary:
        lines.append(
            f"  {ordinary.name}: {ordinary.ordinary_flagged} of {ordinary.ordinary} ordinary first turns flagged "
            f"({ordinary.false_positive_rate:.2%})"
        )
    for test in found.tests:
        recall, auprc = test.overall.recall, test.overall.auprc
        lines.append(f"  {test.name}: recall {recall or 0.0:.3f}, AUPRC {auprc or 0.0:.3f}")
    return "\n".join(lines)


@contextlib.contextmanager
def _progress() -> Generator[ProgressSink]:
    from quant.progress import BarProgress, LineProgress

    if not sys.stderr.isatty():
        yield LineProgress()
        return
    with BarProgress() as bar:
        yield bar
