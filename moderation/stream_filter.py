"""The seam through which every generated character leaves: a filter releases text that was judged, or stops the stream.

One filter belongs to one choice of one request. The gateway feeds it the detokenizer's deltas, has it judge what is due
(in a thread: a judgement may take tens of milliseconds) and sends only what it hands out.

What `JudgingFilter` does depends on the text alone, never on the pieces it came in. Sizes are in units: a Chinese,
Japanese or Korean character counts as three, any other as one. Each time `grid` more units have come, and at the end,
the last `window` units are judged; so is the beginning, up to its first word end behind `hold` units if one comes
within a `grid`, so that the first text leaves as early as it may. A window ends behind the last character that is no
letter or digit, if there is one in its last `grid` units, so that "cock" is not judged for "cocktail". Text leaves up
to `hold` units before the end of the last judged window. Where that window is suspicious (from `suspicion` times a
threshold on), what is held grows up to `window` units, until a later window is not suspicious or the text ends.

Guarantee. Call a passage seen if every window that contains it whole and ends less than three `grid` after it is
flagged. Then, whatever the tokens and deltas it came in:
  - of a seen passage of at most `hold` units no character leaves;
  - of a longer one, up to `window` - 4 * `grid` units, the last `hold` units never leave, and nothing of it leaves if
    every window that ends inside it more than `hold` units behind its beginning is suspicious;
  - nothing that follows a flagged window leaves.
A passage that is not flagged in its windows is not held: the filter is as good as its classifier.
"""

from __future__ import annotations

import bisect
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from moderation.errors import ModerationError
from moderation.features import CJK
from moderation.policy import CJK_DENSITY, Verdict

__all__ = ["FilterOptions", "JudgingFilter", "PassThrough", "Release", "StreamFilter", "judged_windows"]

_CJK_CHARACTER = re.compile(f"[{CJK}]")
# A window may end behind any of these: all but letters, digits and marks of scripts that write spaces between words.
_WORD_END = re.compile(rf"[\W_{CJK}]")


@dataclass(frozen=True, slots=True)
class Release:
    """`text` may be sent to the client now; after `is_stopped` nothing more may follow in this choice.

    A stopped choice ends with `finish_reason: "content_filter"` and its sequence is cancelled. `is_complete`: the text
    has ended and all of it has left.
    """

    text: str
    is_stopped: bool = False
    is_complete: bool = False


_NOTHING = Release("")
_HARMLESS = Verdict(False, 0.0, 1.0, {}, {})


class StreamFilter(Protocol):
    """`feed` and `end` cost nothing. While `is_due`, `judge` brings out what `take` may hand out next."""

    @property
    def is_due(self) -> bool: ...
    @property
    def is_stopped(self) -> bool:
        """Nothing leaves any more: something was flagged, or the judge failed."""
        ...

    @property
    def verdict(self) -> Verdict | None:
        """The flagged one, or the most severe so far; None while nothing was judged."""
        ...

    @property
    def flagged_text(self) -> str | None:
        """The window that was flagged."""
        ...

    def feed(self, text: str) -> None: ...
    def end(self) -> None:
        """Called once when the choice has ended by itself."""
        ...

    def judge(self) -> None:
        """Raises what the judge raises; nothing leaves any more then."""
        ...

    def take(self) -> Release: ...


class PassThrough:
    """Holds nothing back and stops nothing."""

    is_due = False
    is_stopped = False
    verdict: Verdict | None = None
    flagged_text: str | None = None

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._is_ended = False

    def feed(self, text: str) -> None:
        self._pieces.append(text)

    def end(self) -> None:
        self._is_ended = True

    def judge(self) -> None:
        return None

    def take(self) -> Release:
        text = "".join(self._pieces)
        self._pieces.clear()
        return Release(text, is_complete=self._is_ended)


@dataclass(frozen=True, slots=True)
class FilterOptions:
    """Sizes in units, as the module's docstring has them.

    The first text leaves at the first word end behind `hold` units, some ten tokens.
    `suspicion` is a share of the threshold.
    """

    least: int = 72
    grid: int = 48
    hold: int = 40
    window: int = 300
    suspicion: float = 0.3

    def __post_init__(self) -> None:
        if self.grid < CJK_DENSITY or self.hold < 0 or self.hold + 4 * self.grid > self.window:
            raise ModerationError(
                f"grid {self.grid}, hold {self.hold}, window {self.window}: the grid must be at least {CJK_DENSITY}, "
                "and the window no smaller than the hold and four steps of the grid"
            )
        if not 0 <= self.least <= 3 * self.grid:
            raise ModerationError(f"least is {self.least}; it must be at most three steps of the grid, {3 * self.grid}")
        if not 0.0 < self.suspicion <= 1.0:
            raise ModerationError(f"suspicion is {self.suspicion}; it must be above 0 and at most 1")


class JudgingFilter:
    """Holds text back until it was judged; `only_observes` judges the same windows and holds nothing.

    Not for two threads at once: the gateway waits for `judge` before it calls anything else.
    """

    def __init__(
        self,
        judge: Callable[[str], Verdict],
        options: FilterOptions = FilterOptions(),
        *,
        only_observes: bool = False,
    ) -> None:
        self.verdict: Verdict | None = None
        self.flagged_text: str | None = None
        self._judge = judge
        self._options = options
        self._only_observes = only_observes
        self._text = _Tail()
        self._due: deque[int] = deque()  # where windows must be judged, as numbers of characters
        self._has_first = False
        self._judged = 0
        self._cleared = 0  # so many characters may leave
        self._released = 0
        self._is_ended = False
        self.is_stopped = False

    @property
    def is_due(self) -> bool:
        return bool(self._due) or self._is_rest_due

    def feed(self, text: str) -> None:
        if self.is_stopped:
            return
        start = self._text.length
        points = self._text.append(text, self._options.grid)
        if not self._is_decided:
            self._due.extend(sorted({*points, *self._first_word_end(start)}))

    def end(self) -> None:
        self._is_ended = True

    def judge(self) -> None:
        try:
            while self._due:
                self._judge_until(self._text.word_end(self._due.popleft(), self._options.grid))
            if self._is_rest_due:
                self._judge_until(self._text.length)
        except BaseException:
            self._cleared = self._released
            self._stop()
            raise

    def take(self) -> Release:
        if self._only_observes or (self._is_ended and not self.is_due and not self.is_stopped):
            self._cleared = self._text.length
        if self._cleared == self._released and not self._is_ended and not self.is_stopped:
            return _NOTHING
        text = self._text.between(self._released, self._cleared)
        self._released = self._cleared
        if not self.is_due:
            self._text.forget_before(min(self._released, self._text.back_from(self._judged, self._options.window)))
        is_complete = self._is_ended and self._released == self._text.length
        return Release(text, is_stopped=self.is_stopped, is_complete=is_complete and not self.is_stopped)

    @property
    def _is_rest_due(self) -> bool:
        is_open = self._is_ended and not self.is_stopped and not self._is_decided
        return is_open and self._judged < self._text.length

    def _first_word_end(self, start: int) -> list[int]:
        """The end of the beginning's window if it lies behind `start`, where text was added."""
        if self._has_first:
            return []
        end = self._text.first_word_end(start, self._options.hold, self._options.hold + self._options.grid)
        self._has_first = end is not None
        return [] if end is None else [end]

    @property
    def _is_decided(self) -> bool:
        """In observation: what would have stopped the stream was seen; the rest need not be judged."""
        return self.verdict is not None and self.verdict.flagged

    def _judge_until(self, end: int) -> None:
        if end <= self._judged:
            return
        options = self._options
        start = self._text.word_start(self._text.back_from(end, options.window), options.grid)
        window = self._text.between(start, end)
        verdict = self._judge(window)
        if verdict.flagged and self._is_beginning(end):
            return  # all is still held, and the next window begins where this one did
        if self.verdict is None or verdict.flagged or verdict.severity > self.verdict.severity:
            self.verdict = verdict
        self._judged = end
        if verdict.flagged:
            self.flagged_text = window
            self._due.clear()
            if not self._only_observes:
                self._stop()
            return
        held = options.window if verdict.severity >= options.suspicion else options.hold
        self._cleared = max(self._cleared, self._text.back_from(end, held))

    def _is_beginning(self, end: int) -> bool:
        is_whole = self._is_ended and end == self._text.length
        return not is_whole and self._text.units_at(end) < self._options.least

    def _stop(self) -> None:
        self.is_stopped = True
        self._due.clear()


def judged_windows(text: str, options: FilterOptions = FilterOptions()) -> list[str]:
    """The windows of a whole answer that may stop it, as long as none does."""
    windows: list[str] = []

    def collect(window: str) -> Verdict:
        windows.append(window)
        return _HARMLESS

    stream = JudgingFilter(collect, options)
    stream.feed(text)
    stream.end()
    stream.judge()
    return [window for window in windows if sum(_weights(window)) >= options.least] or windows[-1:]


class _Tail:
    """The end of a growing text, addressed by positions in the whole text, with the units up to each position."""

    def __init__(self) -> None:
        self._text = ""
        self._dropped = 0  # characters before `_text`
        self._units = [0]  # up to the beginning of `_text` and behind each of its characters

    @property
    def length(self) -> int:
        return self._dropped + len(self._text)

    def append(self, text: str, grid: int) -> list[int]:
        """Returns the positions at which another `grid` units were complete."""
        units = list(accumulate(_weights(text), initial=self._units[-1]))
        start = self.length
        self._text += text
        self._units += units[1:]
        return [start + i for i in range(1, len(units)) if units[i] // grid > units[i - 1] // grid]

    def between(self, start: int, end: int) -> str:
        return self._text[max(0, start - self._dropped) : max(0, end - self._dropped)]

    def units_at(self, position: int) -> int:
        return self._units[position - self._dropped]

    def back_from(self, position: int, units: int) -> int:
        """The last position with at least `units` between it and `position`; the beginning where there are fewer."""
        wanted = self._units[position - self._dropped] - units
        return self._dropped + max(0, bisect.bisect_right(self._units, wanted) - 1)

    def word_end(self, position: int, units: int) -> int:
        """The last position behind a character that ends words, less than `units` before `position`; or `position`."""
        last = self._units[position - self._dropped]
        for end in range(position, self._dropped, -1):
            if last - self._units[end - self._dropped] >= units:
                break
            if _WORD_END.match(self._text[end - self._dropped - 1]):
                return end
        return position

    def first_word_end(self, start: int, above: int, below: int) -> int | None:
        """The first position past `start` behind a character that ends words, with so many units before it."""
        for end in range(start + 1, self.length + 1):
            if self._units[end - self._dropped] >= below:
                break
            if self._units[end - self._dropped] > above and _WORD_END.match(self._text[end - self._dropped - 1]):
                return end
        return None

    def word_start(self, position: int, units: int) -> int:
        """The first position behind a character that ends words, less than `units` after `position`; or `position`."""
        first = self._units[position - self._dropped]
        for start in range(position, self.length):
            if self._units[start - self._dropped] - first >= units:
                break
            if start == 0 or _WORD_END.match(self._text[start - self._dropped - 1]):
                return start
        return position

    def forget_before(self, position: int) -> None:
        num = position - self._dropped - 1  # the character before a window says whether a word begins there
        if num >= 1024:  # now and then: dropping costs as much as is kept
            self._text = self._text[num:]
            self._units = self._units[num:]
            self._dropped += num


def _weights(text: str) -> list[int]:
    if text.isascii():
        return [1] * len(text)
    return [CJK_DENSITY if _CJK_CHARACTER.match(character) else 1 for character in text]
