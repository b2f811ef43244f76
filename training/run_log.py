"""What a run writes while it goes: log.csv, TensorBoard events, a progress bar, and a picture of the curves.

The CSV is the truth: TensorBoard files and the picture are made from the same rows.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from torch.utils.tensorboard.writer import SummaryWriter

CSV_NAME = "log.csv"
PICTURE_NAME = "training.png"
_SECONDS_BETWEEN_LINES = 10.0


class RunLog:
    """A context manager. record() adds one row; a resumed run drops the rows after its checkpoint first.

    num_steps: of the whole run, for the bar and the time left.
    """

    def __init__(self, run_dir: Path, *, stage: str, num_steps: int, first_step: int = 0) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / CSV_NAME
        self._rows = [row for row in read_log(run_dir) if row["step"] <= first_step]
        self._columns = list(dict.fromkeys(name for row in self._rows for name in row)) or ["step"]
        self._rewrite()
        self._stage = stage
        self._num_steps = num_steps
        self._first_step = first_step
        self._started = time.monotonic()
        self._last_line = -_SECONDS_BETWEEN_LINES
        self._events = _events_writer(run_dir, first_step)
        self._bar, self._task = _bar(stage, num_steps, first_step)

    def __enter__(self) -> RunLog:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._events is not None:
            self._events.close()

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """step: steps done, counted from 1. values: by name, as `loss`, `tokens_per_second`, `learning_rate`."""
        row = {"step": float(step), **values}
        self._rows.append(row)
        if new := [name for name in row if name not in self._columns]:
            self._columns += new
            self._rewrite()
        else:
            with self._path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow([_cell(row.get(name)) for name in self._columns])
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        self._show(step, values)

    def _rewrite(self) -> None:
        partial = self._path.with_suffix(".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self._columns)
            writer.writerows([_cell(row.get(name)) for name in self._columns] for row in self._rows)
        partial.replace(self._path)

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        shown = "  ".join(f"{name} {values[name]:.4g}" for name in ("loss", "reward", "kl") if name in values)
        if "tokens_per_second" in values:
            shown += f"  {values['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description=f"{self._stage}  {shown}")
            return
        now = time.monotonic() - self._started
        if now - self._last_line < _SECONDS_BETWEEN_LINES and step < self._num_steps:
            return
        self._last_line = now
        left = now / max(1, step - self._first_step) * (self._num_steps - step)
        print(f"{self._stage} {step}/{self._num_steps}  {shown}  {left:,.0f} s left", file=sys.stderr, flush=True)


def read_log(run_dir: Path) -> list[dict[str, float]]:
    """The rows of log.csv; empty if there is none. A line cut off by a crash is left out."""
    path = run_dir / CSV_NAME
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    whole = [row for row in rows if None not in row and all(value is not None for value in row.values())]
    return [{name: float(value) for name, value in row.items() if value} for row in whole]


def plot_run(run_dir: Path, title: str) -> Path:
    """training.png: one panel for each logged quantity, raw and smoothed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_log(run_dir)
    names = list(dict.fromkeys(name for row in rows for name in row if name != "step")) or ["step"]
    num_columns = min(3, len(names))
    num_rows = -(-len(names) // num_columns)
    figure = Figure(figsize=(5 * num_columns, 3 * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for index, name in enumerate(names):
        axes = figure.add_subplot(num_rows, num_columns, index + 1)
        points = [(row["step"], row[name]) for row in rows if name in row]
        steps, values = [step for step, _ in points], [value for _, value in points]
        axes.plot(steps, values, color="0.75", linewidth=0.8)
        # A schedule is no noise.
        line = values if name == "learning_rate" else smooth(values)
        axes.plot(steps, line, color="tab:blue", linewidth=1.4)
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
    path = run_dir / PICTURE_NAME
    figure.savefig(path, dpi=90)
    return path


def smooth(values: list[float]) -> list[float]:
    """Exponential mean over about a fiftieth of the points, without the pull of its start."""
    keep = 1 - 1 / max(1.0, len(values) / 50)
    smoothed: list[float] = []
    total = weight = 0.0
    for value in values:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed


def _cell(value: float | None) -> str:
    return "" if value is None else repr(value)


def _events_writer(run_dir: Path, first_step: int) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        print("TensorBoard is not installed; logging to log.csv only (pip install 'causerie[train]')", file=sys.stderr)
        return None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None)


def _bar(stage: str, num_steps: int, first_step: int) -> tuple[Progress, TaskID] | tuple[None, None]:
    if not sys.stderr.isatty():
        return None, None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    return progress, progress.add_task(stage, total=num_steps, completed=first_step)
