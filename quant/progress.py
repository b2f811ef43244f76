"""Where long work says how far it has come: a bar on a terminal, JSON lines for a parent process, or nowhere.

The work itself knows only the `ProgressSink` protocol.
"""

from __future__ import annotations

import json
import sys
from types import TracebackType
from typing import Protocol, TextIO


class ProgressSink(Protocol):
    def update(self, stage: str, done: float, total: float) -> None:
        """`done` of `total` units of `stage` are finished. `done` never falls within a stage."""
        ...


class SilentProgress:
    def update(self, stage: str, done: float, total: float) -> None:
        pass


class JsonLinesProgress:
    """One line {"stage", "done", "total"} per update, flushed, so that a parent process can follow."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout

    def update(self, stage: str, done: float, total: float) -> None:
        self._stream.write(json.dumps({"stage": stage, "done": done, "total": total}) + "\n")
        self._stream.flush()


class LineProgress:
    """For a log file or a pipe: one line when a stage begins and one when it ends, one alone for both at once."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._stage = ""

    def update(self, stage: str, done: float, total: float) -> None:
        if stage != self._stage:
            self._stage = stage
            self._stream.write(f"{stage} ...\n" if done < total else f"{stage}\n")
        elif done >= total:
            self._stream.write(f"{stage} done\n")
        self._stream.flush()


class BarProgress:
    """A bar per stage, drawn by rich on standard error; used as a context manager so that the terminal is restored."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._task_of_stage: dict[str, TaskID] = {}

    def __enter__(self) -> BarProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, stage: str, done: float, total: float) -> None:
        if stage not in self._task_of_stage:
            self._task_of_stage[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._task_of_stage[stage], completed=done, total=total)
