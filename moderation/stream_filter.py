"""The seam through which every generated character leaves: a filter releases text that was judged, or stops the stream.

One filter belongs to one choice of one request. The gateway feeds it the detokenizer's deltas and sends only what comes
back. `PassThrough` releases everything at once: output is not judged yet, the place where it will be is already in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["PassThrough", "Release", "StreamFilter"]


@dataclass(frozen=True, slots=True)
class Release:
    """`text` may be sent to the client now; after `is_stopped` nothing more may follow in this choice.

    A stopped choice ends with `finish_reason: "content_filter"` and its sequence is cancelled.
    """

    text: str
    is_stopped: bool = False


class StreamFilter(Protocol):
    def feed(self, text: str) -> Release:
        """Takes the next piece of generated text and returns what may leave; may hold text back."""
        ...

    def finish(self) -> Release:
        """Called once when the choice ended by itself; releases what was held back, or stops."""
        ...


class PassThrough:
    """Holds nothing back and stops nothing."""

    def feed(self, text: str) -> Release:
        return Release(text)

    def finish(self) -> Release:
        return Release("")
