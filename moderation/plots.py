"""The report as pictures in one look. Each function draws one figure; `write_plots` says which there are."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moderation.errors import ModerationError
from moderation.goals import headline_measure
from moderation.metrics import Measures
from moderation.report import FileReport, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_plots_possible", "write_plots"]

DPI = 100
WIDTH = 8.0
PALETTE = 64
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray")
FOUND, REFUSED = "tab:blue", "tab:orange"
# A group of few rows moves by much for one row; it stays in the card's tables.
MIN_GROUP_ROWS = 20


def check_plots_possible() -> None:
    """Raises ModerationError if matplotlib is missing: asked before minutes of judging, not after."""
    if find_spec("matplotlib") is None:
        raise ModerationError("matplotlib is not installed and the report has plots; pip install 'causerie[train]'")


def write_plots(report: Report, folder: Path) -> list[str]:
    """Writes the figures that the report has something for. Returns the files' names."""
    figures = {
        "pr_curves.png": _curves(report.tests),
        "calibration.png": _calibration([test for test in (report.dev, *report.tests) if test is not None]),
        "by_category.png": _by_category(report.tests),
        "by_length.png": _by_length(report.tests),
    }
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        _save(figure, folder / name)
    return list(drawn)


def _curves(tests: Sequence[FileReport]) -> Figure | None:
    with_curve = [test for test in tests if test.curve]
    if not with_curve:
        return None
    figure = _new_figure(WIDTH, 5.2)
    axes = figure.add_subplot()
    for test, colour in zip(with_curve, COLOURS * len(with_curve), strict=False):
        area, value = headline_measure(test)
        label = test.short_name.removeprefix("test_") + ("" if value is None else f", {area} {value:.2f}")
        axes.plot([p.recall for p in test.curve], [p.precision for p in test.curve], color=colour, lw=1.6, label=label)
        if test.overall.recall is not None and test.overall.precision is not None:
            axes.plot([test.overall.recall], [test.overall.precision], "o", color=colour, ms=6)
    _unit_axes(axes, "recall: share of harmful rows found", "precision: share of found rows that are harmful")
    axes.legend(fontsize=8, loc="lower left")
    axes.set_title("dots: at the default threshold", fontsize=9, loc="left")
    return figure


def _calibration(files: Sequence[FileReport]) -> Figure | None:
    with_bins = [test for test in files if test.reliability]
    if not with_bins:
        return None
    num_rows = -(-len(with_bins) // 4)
    figure = _new_figure(WIDTH, 0.5 + 2.1 * num_rows)
    for index, test in enumerate(with_bins, start=1):
        axes = figure.add_subplot(num_rows, 4, index)
        axes.plot([0, 1], [0, 1], color="0.6", lw=1, ls="--")
        largest = max(one.rows for one in test.reliability)
        axes.scatter(
            [one.mean_probability for one in test.reliability],
            [one.share_harmful for one in test.reliability],
            s=[6 + 60 * one.rows / largest for one in test.reliability],
            color=FOUND,
            alpha=0.8,
        )
        _unit_axes(axes, "", "")
        axes.tick_params(labelsize=7)
        name = test.short_name.removeprefix("test_").removesuffix("_indomain").removesuffix("_crossdomain")
        axes.set_title(f"{name}, error {test.overall.calibration_error:.2f}", fontsize=7.5)
    figure.supxlabel("probability that was said", fontsize=9)
    figure.supylabel("share that is harmful (dot: rows)", fontsize=9)
    return figure


def _by_category(tests: Sequence[FileReport]) -> Figure | None:
    """Harmful rows found, by what the test files say is harmful in them. HateCheck's functions stay in the tables."""
    groups = [
        (f"{test.short_name.removeprefix('test_').split('_')[0]}: {name}", measures)
        for test in tests
        if test.short_name not in ("test_hatecheck", "test_xstest")
        for name, measures in test.by_category.items()
        if measures.recall is not None and measures.harmful >= MIN_GROUP_ROWS
    ]
    if not groups:
        return None
    figure = _new_figure(WIDTH, 0.9 + 0.2 * len(groups))
    axes = figure.add_subplot()
    axes.barh(range(len(groups)), [measures.recall or 0.0 for _, measures in groups], color=FOUND, height=0.7)
    for index, (_, measures) in enumerate(groups):
        axes.text((measures.recall or 0.0) + 0.01, index, f"{measures.recall:.2f} of {measures.harmful}", fontsize=7)
    axes.set_yticks(range(len(groups)), [name for name, _ in groups], fontsize=7.5)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(0, 1.12)
    axes.set_xlabel("recall at the default threshold", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    return figure


def _by_length(tests: Sequence[FileReport]) -> Figure | None:
    with_lengths = [test for test in tests if test.by_length]
    if not with_lengths:
        return None
    num_rows = -(-len(with_lengths) // 4)
    figure = _new_figure(WIDTH, 0.7 + 1.9 * num_rows)
    for index, test in enumerate(with_lengths, start=1):
        axes = figure.add_subplot(num_rows, 4, index)
        groups = list(test.by_length.items())
        for side, colour, shift in (("recall", FOUND, -0.2), ("false positives", REFUSED, 0.2)):
            values = [(i, _side(measures, side)) for i, (_, measures) in enumerate(groups)]
            shown = [(i + shift, value) for i, value in values if value is not None]
            axes.bar([x for x, _ in shown], [value for _, value in shown], width=0.38, color=colour, label=side)
        axes.set_xticks(range(len(groups)), [_short_bucket(name) for name, _ in groups], fontsize=6.5)
        axes.set_ylim(0, 1)
        axes.tick_params(axis="y", labelsize=7)
        axes.grid(axis="y", alpha=0.3)
        name = test.short_name.removeprefix("test_").removesuffix("_indomain").removesuffix("_crossdomain")
        axes.set_title(name, fontsize=8)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize=8)
    figure.supxlabel("characters of the text", fontsize=9)
    return figure


def _short_bucket(name: str) -> str:
    return name.replace(" and more", "+").replace(" to ", "–").replace("under ", "<")


def _side(measures: Measures, side: str) -> float | None:
    return measures.recall if side == "recall" else measures.false_positive_rate


def _save(figure: Figure, path: Path) -> None:
    """With a palette: a quarter of the bytes, and no version inside, so that the same report gives the same file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(PALETTE).save(path, optimize=True)


def _new_figure(width: float, height: float) -> Figure:
    # Not pyplot: it keeps figures in a global list and may look for a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _unit_axes(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.grid(alpha=0.3)
