"""What can go wrong in moderation. None of it ever means "not flagged": whoever catches one of these refuses the text.

ModerationError
└── WeightsError (file, expected, found; start-up only)
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["ModerationError", "WeightsError"]


class ModerationError(Exception):
    """The classifier, its weights or its data cannot be used; the message is one line for the operator."""


class WeightsError(ModerationError):
    """A file of the weights directory is missing, damaged or of another format."""

    def __init__(self, path: Path, found: str, cure: str) -> None:
        super().__init__(f"moderation weights {path}: {found}; {cure}")
        self.path = path
