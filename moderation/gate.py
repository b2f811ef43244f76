"""Before retrained weights replace others: which test files they fall on. Called by training when it publishes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moderation.errors import ModerationError
from moderation.goals import headline_measure
from moderation.report import REPORT_FILE, FileReport, Report, read_report

__all__ = ["ALLOWED_POINTS", "Fall", "check_falls", "fallen_files"]

ALLOWED_POINTS = 1.0
# Differences of floating point are no fall.
TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Fall:
    """new is None where the new report lacks the file or the measure: what was not measured may have fallen."""

    file: str
    measure: str
    old: float
    new: float | None
    has_other_rows: bool = False

    def __str__(self) -> str:
        if self.new is None:
            return f"{self.file} {self.measure} {self.old:.3f} to not measured"
        points = 100.0 * (self.old - self.new)
        changed = ", and the file has changed" if self.has_other_rows else ""
        return f"{self.file} {self.measure} {self.old:.3f} to {self.new:.3f} ({points:.1f} points{changed})"


def fallen_files(old: Report, new: Report, allowed_points: float = ALLOWED_POINTS) -> list[Fall]:
    """Test files whose headline measure is more than `allowed_points` hundredths lower than it was, in their order."""
    found = (_fall(test, new.test(test.short_name), allowed_points) for test in old.tests)
    return [fall for fall in found if fall is not None]


def check_falls(directory: Path, new: Report, *, accept_falls: bool) -> list[Fall]:
    """Falls from the report in `directory` that were accepted; none if there is no report yet.

    Raises ModerationError, naming every fall and the way out, unless they are accepted.
    """
    path = directory / REPORT_FILE
    falls = fallen_files(read_report(path), new) if path.exists() else []
    if falls and not accept_falls:
        raise ModerationError(_refusal(directory, falls))
    return falls


def _fall(old: FileReport, new: FileReport | None, allowed_points: float) -> Fall | None:
    name, before = headline_measure(old)
    if before is None:
        return None
    after = None if new is None else headline_measure(new)[1]
    if after is not None and before - after <= allowed_points / 100.0 + TOLERANCE:
        return None
    return Fall(old.short_name, name, before, after, new is not None and new.sha256 != old.sha256)


def _refusal(directory: Path, falls: Sequence[Fall]) -> str:
    return (
        f"the weights in {directory} stay as they are: the new ones fall by more than {ALLOWED_POINTS:g} point on "
        f"{'; '.join(map(str, falls))}. Replace them all the same with --accept-falls, or write the new ones elsewhere "
        "with --out DIR"
    )
