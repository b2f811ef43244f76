"""The evaluation as pictures. Each function draws one figure and returns it; `write_plots` says which there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.evaluate.divergence import kl_of_best_of
from training.evaluate.intervals import Measure
from training.evaluate.report import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["write_plots"]

_NEW, _OLD, _SECOND = "tab:blue", "tab:gray", "tab:orange"
_WIN_RATES = ("win_rate", "second_win_rate", "best_of_win_rate", "second_best_of_win_rate")
_SHARES = (
    "refusal_harmful",
    "refusal_harmless",
    "flagged_answers",
    "flagged_harmful",
    "answers_ended",
    "gsm8k_correct",
    "ifeval_prompt_strict",
    "ifeval_instruction_strict",
)


def write_plots(evaluation: Evaluation, answer_tokens: Mapping[str, Sequence[int]], folder: Path) -> list[str]:
    """answer_tokens: lengths of the answers to the prompts, by model, the new one first. Returns the files' names."""
    figures = {
        "win_rate.png": _win_rates(evaluation),
        "reward_kl.png": _reward_against_kl(evaluation),
        "lengths.png": _lengths(answer_tokens),
        "shares.png": _shares(evaluation),
        "ifeval.png": _ifeval(evaluation.instructions),
    }
    names = [name for name, figure in figures.items() if figure is not None]
    for name in names:
        figure = figures[name]
        assert figure is not None
        figure.savefig(folder / name, dpi=110)
    return names


def _win_rates(evaluation: Evaluation) -> Figure | None:
    found = [(name, evaluation.new[name]) for name in _WIN_RATES if name in evaluation.new]
    if not found or evaluation.against is None:
        return None
    figure, axes = _new_figure(height=1.6 + 0.5 * len(found))
    for index, (name, measure) in enumerate(found):
        _point(axes, measure, index, _SECOND if name.startswith("second") else _NEW)
    axes.axvline(0.5, color="0.5", linestyle="--", linewidth=1)
    _name_rows(axes, [name.replace("_", " ") for name, _ in found])
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"{evaluation.model.name} over {evaluation.against.name}: share of prompts won, 95 %")
    return figure


def _reward_against_kl(evaluation: Evaluation) -> Figure | None:
    """What each judge says as the policy moves away: a first judge that rises while the second falls is being gamed."""
    kl, curve = evaluation.new.get("kl_per_answer"), evaluation.best_of
    if "reward" not in evaluation.new or (curve is None and kl is None):
        return None
    figure, axes = _new_figure(height=4.0)
    for prefix, judge, colour in zip(("", "second_"), evaluation.judges, (_NEW, _SECOND), strict=False):
        base = evaluation.new[f"{prefix}reward"].value
        if curve is not None:
            values = curve.first if prefix == "" else curve.second
            assert values is not None
            distances = [kl_of_best_of(k) for k in range(1, len(values) + 1)]
            axes.plot(
                distances,
                [value - values[0] for value in values],
                "o-",
                ms=3,
                color=colour,
                label=f"best-of-N, {judge}",
            )
        if kl is not None and f"{prefix}reward" in evaluation.old:
            gain = base - evaluation.old[f"{prefix}reward"].value
            axes.plot([max(0.0, kl.value)], [gain], "*", ms=12, color=colour, label=f"new over old model, {judge}")
    axes.axhline(0, color="0.5", linewidth=0.8)
    axes.set_xlabel("KL from where it started, nats of an answer")
    axes.set_ylabel("gain in reward")
    axes.legend(fontsize=8)
    return figure


def _lengths(answer_tokens: Mapping[str, Sequence[int]]) -> Figure | None:
    if not answer_tokens:
        return None
    figure, axes = _new_figure(height=3.5)
    longest = max(max(lengths) for lengths in answer_tokens.values())
    edges = [longest * index / 20 for index in range(21)] if longest > 20 else list(range(longest + 2))
    for (name, lengths), colour in zip(answer_tokens.items(), (_NEW, _OLD), strict=False):
        axes.hist(lengths, bins=edges, alpha=0.6, label=name, color=colour)
    axes.set_xlabel("tokens of an answer")
    axes.set_ylabel("answers")
    axes.legend(fontsize=8)
    return figure


def _shares(evaluation: Evaluation) -> Figure | None:
    found = [name for name in _SHARES if name in evaluation.new]
    if not found:
        return None
    figure, axes = _new_figure(height=1.4 + 0.45 * len(found))
    for index, name in enumerate(found):
        _point(axes, evaluation.new[name], index - 0.12, _NEW)
        if name in evaluation.old:
            _point(axes, evaluation.old[name], index + 0.12, _OLD)
    _name_rows(axes, [name.replace("_", " ") for name in found])
    axes.set_xlim(0, 1)
    old = "" if evaluation.against is None else f", grey {evaluation.against.name}"
    axes.set_xlabel(f"share, 95 %; blue {evaluation.model.name}{old}")
    return figure


def _ifeval(instructions: Mapping[str, Measure]) -> Figure | None:
    if not instructions:
        return None
    figure, axes = _new_figure(height=1.2 + 0.3 * len(instructions))
    for index, measure in enumerate(instructions.values()):
        _point(axes, measure, index, _NEW)
    _name_rows(axes, list(instructions))
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of instructions followed, strict, 95 %")
    return figure


def _new_figure(height: float) -> tuple[Figure, Axes]:
    # Not pyplot: it keeps figures in a global list and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _point(axes: Axes, measure: Measure, row: float, colour: str) -> None:
    low = measure.value if measure.low is None else measure.low
    high = measure.value if measure.high is None else measure.high
    axes.plot([low, high], [row, row], color=colour, linewidth=2)
    axes.plot([measure.value], [row], "o", color=colour)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
