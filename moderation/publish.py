"""Writes report, plots and model card beside weights. Called by `causerie moderation report` and after training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec

from moderation.card import CardFacts, render_card
from moderation.errors import ModerationError
from moderation.plots import write_plots
from moderation.report import CARD_FILE, REPORT_FILE, Report, encode_report

__all__ = ["MANIFEST_FILE", "read_card_facts", "write_report"]

MANIFEST_FILE = "manifest.json"


def write_report(report: Report, weights: Path, out: Path) -> list[str]:
    """Writes report.json, the plots and README.md into `out`, which may be the weights directory itself.

    weights: the directory of the judged weights, with their manifest. Returns the names of the written files.
    """
    facts = read_card_facts(weights)
    if facts.model != report.model:
        raise ModerationError(
            f"{weights / MANIFEST_FILE} is of {facts.model}, and {report.model} was judged; write the weights anew"
        )
    out.mkdir(parents=True, exist_ok=True)
    pictures = write_plots(report, out)
    (out / REPORT_FILE).write_bytes(encode_report(report))
    (out / CARD_FILE).write_text(render_card(facts, report, pictures), encoding="utf-8")
    return [REPORT_FILE, CARD_FILE, *pictures]


def read_card_facts(weights: Path) -> CardFacts:
    """Raises ModerationError if the directory has no usable manifest."""
    path = weights / MANIFEST_FILE
    try:
        facts = msgspec.json.decode(path.read_bytes(), type=CardFacts)
    except (OSError, msgspec.MsgspecError) as error:
        cure = "the model card needs it; write the weights anew with `causerie train moderation`"
        raise ModerationError(f"{path} cannot be used ({error}); {cure}") from None
    return replace(facts, weights_bytes=_size_without_report(weights))


def _size_without_report(weights: Path) -> int:
    shown = {REPORT_FILE, CARD_FILE}
    files = [path for path in weights.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if path.name not in shown and path.suffix != ".png")
