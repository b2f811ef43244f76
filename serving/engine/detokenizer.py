"""Token ids to text, one sequence at a time: never half a character, never the first half of a stop string.

Works on the exact bytes of each token, so joined deltas equal the bytes of all tokens decoded at once.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Detokenizer:
    """Feed ids, get the text that may be shown. What was returned is never taken back.

    token_bytes: bytes by token id; special tokens have none.
    stop:        strings that end the text and are not part of it.
    strips_leading_space: drop one space at the very beginning, as sentencepiece tokenizers do when they decode.
    """

    def __init__(
        self, token_bytes: Sequence[bytes], stop: Sequence[str] = (), *, strips_leading_space: bool = False
    ) -> None:
        self._token_bytes = token_bytes
        self._strips_next = strips_leading_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(stop)
        self._held = ""  # decoded text that may be the beginning of a stop string
        self.is_stopped = False

    def feed(self, token_id: int) -> str:
        """Text released by one more token. Sets `is_stopped` when a stop string is complete."""
        text = self._decoder.decode(self._token_bytes[token_id])
        if self._strips_next and text:
            text = text.removeprefix(" ")
            self._strips_next = False
        if not self._stop:
            return text
        return self._release(self._held + text)

    def finish(self) -> str:
        """Whatever is still held: an unfinished character becomes U+FFFD, an unfinished stop string is text."""
        if self.is_stopped:
            return ""
        rest = self._decoder.decode(b"", final=True)
        if not self._stop:
            return rest
        text = self._release(self._held + rest)
        if self.is_stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        found = [position for position in (text.find(stop) for stop in self._stop) if position >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)]
        num_held = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that begins `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if stop.startswith(text[len(text) - length :]):
            return length
    return 0
