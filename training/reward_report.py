"""What a reward model is worth on rows that it has not seen: reward_report.json, .md and .png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from quant.model_directory import JsonValue
from training.evaluate.intervals import Measure
from training.reward_metrics import (
    CalibrationBin,
    Comparison,
    LengthBias,
    accuracy,
    accuracy_by_source,
    accuracy_where_shorter_is_better,
    calibration,
    length_bias,
)

REPORT_NAME = "reward_report"


@dataclass(frozen=True, slots=True)
class RewardReport:
    """On held-out rankings. accuracy: of pairs, a tie of scores counts half; None where there was no pair.

    before: the accuracy of the untrained head, for comparison
    mean, deviation: of raw scores on training answers; scores are given out in deviations from this mean
    """

    rankings: int
    accuracy: Measure | None
    before: Measure | None
    by_source: Mapping[str, Measure]
    where_shorter_is_better: Measure | None
    calibration_error: float | None
    calibration: tuple[CalibrationBin, ...]
    length_bias: LengthBias
    mean: float
    deviation: float


def build_report(
    comparisons: Sequence[Comparison],
    scores: Sequence[float],
    lengths: Sequence[int],
    *,
    rankings: int,
    before: Measure | None,
    mean: float,
    deviation: float,
) -> RewardReport:
    """comparisons, scores: raw, since a difference of raw scores is what the loss makes a log-odds."""
    bins, error = calibration(comparisons)
    return RewardReport(
        rankings=rankings,
        accuracy=accuracy(comparisons),
        before=before,
        by_source=accuracy_by_source(comparisons),
        where_shorter_is_better=accuracy_where_shorter_is_better(comparisons),
        calibration_error=error,
        calibration=bins,
        length_bias=length_bias(comparisons, scores, lengths),
        mean=mean,
        deviation=deviation,
    )


def manifest_metrics(report: RewardReport) -> dict[str, JsonValue]:
    """The figures that belong into a manifest; the rest is in the report beside it."""
    metrics: dict[str, JsonValue] = {
        "held_out_rankings": report.rankings,
        "calibration_error": report.calibration_error,
    }
    for name, measure in (
        ("accuracy_before", report.before),
        ("accuracy", report.accuracy),
        ("accuracy_where_shorter_is_better", report.where_shorter_is_better),
    ):
        metrics[name] = msgspec.to_builtins(measure)
    return metrics


def write_report(report: RewardReport, directory: Path) -> tuple[Path, ...]:
    """Returns the three files."""
    json_path, markdown_path = directory / f"{REPORT_NAME}.json", directory / f"{REPORT_NAME}.md"
    json_path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    markdown_path.write_text(render_markdown(report), encoding="utf-8")
    return json_path, markdown_path, plot_report(report, directory / f"{REPORT_NAME}.png")


def render_markdown(report: RewardReport) -> str:
    bias = report.length_bias
    rows = [
        ("all held-out pairs", report.accuracy),
        ("before training", report.before),
        ("where the preferred answer is the shorter", report.where_shorter_is_better),
        *((f"source: {source}", measure) for source, measure in report.by_source.items()),
    ]
    table = [f"| {name} | {_shown(measure)} | {0 if measure is None else measure.count} |" for name, measure in rows]
    lines = [
        "# Reward model on held-out rankings",
        "",
        f"{report.rankings:,} rankings. Accuracy is the share of pairs whose preferred answer scores higher, with its "
        "95 % interval (Wilson).",
        "",
        "| of | accuracy | pairs |",
        "| --- | --: | --: |",
        *table,
        "",
        "## Calibration",
        "",
        f"Expected calibration error {_number(report.calibration_error)}: how far the share of right verdicts lies "
        "from the confidence that the difference of two scores stands for.",
        "",
        "| confidence | mean confidence | right | pairs |",
        "| --- | --: | --: | --: |",
        *(
            f"| {item.from_:.2f} to {item.to:.2f} | {item.mean_confidence:.3f} | {item.accuracy:.3f} | {item.pairs} |"
            for item in report.calibration
        ),
        "",
        "## Length",
        "",
        f"- Correlation of score and length in tokens over all answers: {_number(bias.score_to_length)}",
        "- Correlation of the differences of both within pairs (longer minus shorter): "
        f"{_number(bias.margin_to_length_margin)}",
        f"- The longer answer scores higher in {_shown(bias.longer_scores_higher)} of the pairs; "
        f"people preferred it in {_shown(bias.longer_is_preferred)}",
        "",
        f"Scores are given out as (raw - {report.mean:.4g}) / {report.deviation:.4g}, by the training answers.",
    ]
    return "\n".join(lines) + "\n"


def plot_report(report: RewardReport, path: Path) -> Path:
    """Accuracy by source with intervals, and the reliability curve."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    by_source, reliability = figure.subplots(1, 2)
    shown = {"all": report.accuracy, "shorter preferred": report.where_shorter_is_better, **report.by_source}
    bars = [(name, measure) for name, measure in shown.items() if measure is not None]
    for place, (_, measure) in enumerate(bars):
        ends = [[measure.value - (measure.low or 0.0)], [(measure.high or 1.0) - measure.value]]
        by_source.errorbar(measure.value, place, xerr=ends, fmt="o", color="tab:blue", capsize=3)
    by_source.set_yticks(range(len(bars)), [f"{name} ({measure.count})" for name, measure in bars])
    by_source.axvline(0.5, color="0.6", linewidth=0.8)
    by_source.set(xlim=(0, 1), title="accuracy on held-out pairs, 95 % interval")
    by_source.invert_yaxis()
    reliability.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=0.8)
    reliability.scatter(
        [item.mean_confidence for item in report.calibration],
        [item.accuracy for item in report.calibration],
        s=[20 + 2 * item.pairs**0.5 for item in report.calibration],
        color="tab:blue",
    )
    reliability.set(xlabel="confidence", ylabel="right", xlim=(0.49, 1.01), ylim=(0, 1.02), title="calibration")
    figure.savefig(path, dpi=90)
    return path


def _shown(measure: Measure | None) -> str:
    if measure is None or measure.low is None or measure.high is None:
        return "no pairs" if measure is None else f"{measure.value:.1%}"
    return f"{measure.value:.1%} ({measure.low:.1%} to {measure.high:.1%})"


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"
