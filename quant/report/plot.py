"""The report's picture: the error of every linear over the layers, and perplexities on the held-out texts as bars."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from quant.report.quantization_report import QuantizationReport, TextComparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 100
WIDTH, HEIGHT = 11.0, 4.4
# Below this an error is drawn at the floor: a logarithmic axis has no zero.
LEAST_ERROR_PERCENT = 1e-4
BAR_NAMES = ("source", "plain", "as served", "round to nearest")
BAR_COLOURS = ("0.55", "tab:blue", "tab:green", "tab:red")


def is_plot_possible() -> bool:
    return find_spec("matplotlib") is not None


def write_plot(report: QuantizationReport, path: Path) -> None:
    """A PNG of WIDTH x HEIGHT inches. matplotlib must be installed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI)
    FigureCanvasAgg(figure)
    # Fixed margins: having them worked out takes longer than drawing.
    margins = {"left": 0.065, "right": 0.99, "top": 0.93, "bottom": 0.11, "wspace": 0.17}
    errors, bars = figure.subplots(1, 2, gridspec_kw={**margins, "width_ratios": (1.25, 1.0)})
    _draw_errors(errors, report)
    _draw_perplexities(bars, report)
    # The file is the same for the same report: no date, no version.
    figure.savefig(path, metadata={"Software": None})


def _draw_errors(axes: Axes, report: QuantizationReport) -> None:
    """One line a linear; points whose bits or group differ from the rest are hollow."""
    for number, first in enumerate(report.layers[0].linears if report.layers else ()):
        name = first.name.rpartition(".")[2]
        linears = [layer.linears[number] for layer in report.layers]
        values = [max(100 * linear.error, LEAST_ERROR_PERCENT) for linear in linears]
        indices = [layer.index for layer in report.layers]
        (line,) = axes.plot(indices, values, marker="o", ms=3, lw=1.2, label=name)
        usual = (report.bits, report.group_size)
        refined = [place for place, linear in enumerate(linears) if (linear.bits, linear.group_size) != usual]
        axes.scatter(
            [indices[place] for place in refined],
            [values[place] for place in refined],
            s=26,
            facecolors="white",
            edgecolors=line.get_color(),
            zorder=3,
        )
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("error of the outputs (% of their squared norm)")
    axes.set_title(
        f"error of each linear; hollow: not {report.bits} bits, group {report.group_size}", fontsize=9, loc="left"
    )
    axes.grid(visible=True, which="major", alpha=0.3)
    if report.layers:
        axes.legend(fontsize=7, ncols=2)


def _draw_perplexities(axes: Axes, report: QuantizationReport) -> None:
    """A bunch of bars for each text, each bar with its figure on it."""
    width = 0.8 / len(BAR_NAMES)
    for place, (name, colour) in enumerate(zip(BAR_NAMES, BAR_COLOURS, strict=True)):
        heights = [(at, value[place]) for at, value in enumerate(map(_perplexities, report.texts))]
        drawn = [(at + (place - 1.5) * width, height) for at, height in heights if height is not None]
        if drawn:
            bars = axes.bar([at for at, _ in drawn], [height for _, height in drawn], width, color=colour, label=name)
            axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.set_xticks(range(len(report.texts)), [text.name for text in report.texts], fontsize=8)
    axes.set_ylabel("perplexity (less is better)")
    axes.set_title("perplexity on held-out text", fontsize=9, loc="left")
    axes.margins(y=0.28)
    axes.legend(fontsize=7, ncols=2, loc="upper left")


def _perplexities(text: TextComparison) -> tuple[float | None, ...]:
    """In the order of BAR_NAMES; None where it was not measured."""
    paths = (text.plain, text.served, text.round_to_nearest)
    return (text.source_perplexity, *(None if path is None else path.perplexity for path in paths))
