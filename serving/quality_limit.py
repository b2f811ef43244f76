"""The operator's limit on what quantisation may cost: a model whose report says more, or that has none, is not served.

Only reads the report that lies beside the weights; `causerie serve` calls this before it starts an engine.
"""

from __future__ import annotations

from pathlib import Path

from quant.errors import CheckpointError
from quant.report.summary import REPORT_JSON, read_summary

__all__ = ["check_quality"]


def check_quality(directory: Path, min_top1_agreement: float | None) -> str | None:
    """The report's summary line, None where there is no report.

    min_top1_agreement: 0 to 1, or None for no limit. Raises CheckpointError for a model below it or without a report,
    and for a report that cannot be read.
    """
    summary = read_summary(directory)
    if min_top1_agreement is None:
        return None if summary is None else summary.line
    if summary is None:
        raise CheckpointError(
            f"{directory} has no {REPORT_JSON}, so min_top1_agreement = {min_top1_agreement:.1%} cannot be checked; "
            "quantise its source with `causerie quantize`, which writes one, or serve without --min-top1-agreement"
        )
    if summary.top1_agreement < min_top1_agreement:
        raise CheckpointError(
            f"{directory} agrees with its source on {summary.top1_agreement:.1%} of tokens, fewer than "
            f"min_top1_agreement = {min_top1_agreement:.1%}; quantise it again with --bits 8, a smaller --group-size "
            "or --max-perplexity-increase, or lower --min-top1-agreement"
        )
    return summary.line
