"""What the set-up is about to do: numbered steps with megabytes and rough minutes, printed before the first one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# A home line: 50 Mbit/s. Only for the rough minutes.
LINE_MB_PER_MINUTE = 375


@dataclass(frozen=True, slots=True)
class Step:
    """`work_minutes` is what it takes beside the download, on two cores; `memo` goes in place of the figures."""

    text: str
    download_mb: int = 0
    disk_mb: int = 0
    work_minutes: float = 0
    memo: str = ""

    @property
    def minutes(self) -> float:
        return self.work_minutes + self.download_mb / LINE_MB_PER_MINUTE

    @property
    def figures(self) -> str:
        parts = [f"{self.download_mb:,} MB to download" if self.download_mb else "", _rough(self.minutes), self.memo]
        return ", ".join(part for part in parts if part)


def render(title: str, steps: Sequence[Step]) -> str:
    width = max(len(step.text) for step in steps)
    lines = [f"  {number}. {step.text:<{width}}  {step.figures}" for number, step in enumerate(steps, start=1)]
    download = sum(step.download_mb for step in steps)
    total = f"  In all {download:,} MB to download, {sum(step.disk_mb for step in steps):,} MB on disk"
    minutes = _rough(sum(step.minutes for step in steps))
    return "\n".join([title, *lines, f"{total}, {minutes} at 50 Mbit/s. Ctrl-C is safe: the next start goes on."])


def _rough(minutes: float) -> str:
    if minutes == 0:
        return ""
    return "under a minute" if minutes < 0.75 else f"about {round(minutes) or 1} min"
