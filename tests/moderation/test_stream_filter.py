"""What a client may ever receive, for every way of cutting a text into tokens and deltas."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from moderation.errors import ModerationError
from moderation.policy import Verdict
from moderation.stream_filter import FilterOptions, JudgingFilter, PassThrough, StreamFilter, judged_windows

pytestmark = pytest.mark.unit

SMALL = FilterOptions(least=12, grid=4, hold=12, window=40)
# Forty units each at most, so that nothing of them may leave; words, disguises and Chinese.
PASSAGES = ("mix the acid with bleach", "kill", "b.o.m.b", "把炸药放在学校里", "a" * 40, "k i l l them all now", "炸")
BY_DEFAULT = FilterOptions()


def verdict(severity: float) -> Verdict:
    return Verdict(severity >= 1.0, severity / 2, 0.5, {}, {}, severity=severity)


class Judge:
    """Severity 1 for a window with the passage; what `suspicion` says of it otherwise."""

    def __init__(self, passage: str, suspicion: Callable[[str], float] = lambda window: 0.0) -> None:
        self._passage = passage
        self._suspicion = suspicion
        self.windows: list[str] = []

    def __call__(self, window: str) -> Verdict:
        self.windows.append(window)
        return verdict(1.0 if self._passage in window else self._suspicion(window))


def received(stream: StreamFilter, pieces: list[str], *, judged_after: int = 1) -> tuple[list[str], bool]:
    """What leaves when `judge` is called after every so many pieces, and whether the stream was stopped."""
    left: list[str] = []
    for number, piece in enumerate(pieces, 1):
        stream.feed(piece)
        if number % judged_after == 0:
            stream.judge()
        released = stream.take()
        left.append(released.text)
        if released.is_stopped:
            return left, True
    stream.end()
    stream.judge()
    released = stream.take()
    assert released.is_stopped != released.is_complete
    return [*left, released.text], released.is_stopped


def cut(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


TEXTS = st.text(alphabet="ab .,的_\u0301é", max_size=150) | st.text(max_size=80) | st.text(alphabet="x", max_size=400)
CUTS = st.lists(st.integers(0, 1000), max_size=30)


@given(TEXTS, TEXTS, st.sampled_from(PASSAGES), CUTS, st.integers(1, 5))
@example("", "", "kill", [], 1)
@example("x" * 299, "", "a" * 40, [], 1)
@settings(max_examples=150, deadline=None)
def test_no_character_of_a_flagged_passage_leaves_however_the_text_is_cut(
    before: str, after: str, passage: str, cuts: list[int], judged_after: int
) -> None:
    text = before + passage + after
    begin = text.index(passage)

    left, is_stopped = received(JudgingFilter(Judge(passage)), cut(text, cuts), judged_after=judged_after)

    assert is_stopped
    # Nothing from the passage's first character on: less than a word of it, and nothing after it.
    assert len("".join(left)) <= begin
    assert text.startswith("".join(left))


@given(TEXTS, st.sampled_from([SMALL, BY_DEFAULT]), CUTS, st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_a_text_that_is_not_flagged_leaves_whole(
    text: str, options: FilterOptions, cuts: list[int], judged_after: int
) -> None:
    left, is_stopped = received(JudgingFilter(Judge("\0never"), options), cut(text, cuts), judged_after=judged_after)
    assert not is_stopped
    assert "".join(left) == text


def noise(window: str) -> float:
    """Arbitrary, but a function of the window."""
    return sum(map(ord, window)) % 97 / 93


@given(TEXTS, CUTS, st.sampled_from([SMALL, BY_DEFAULT]))
@example("".join(f"word{i} " for i in range(60)), [100, 101], SMALL)
@settings(max_examples=100, deadline=None)
def test_windows_releases_and_the_end_depend_on_the_text_alone(
    text: str, cuts: list[int], options: FilterOptions
) -> None:
    judges = [Judge("\0never", noise) for _ in range(3)]
    streams = [JudgingFilter(judge, options) for judge in judges]

    whole, by_character, as_cut = (
        received(stream, pieces) for stream, pieces in zip(streams, ([text], list(text), cut(text, cuts)), strict=True)
    )

    assert "".join(whole[0]) == "".join(by_character[0]) == "".join(as_cut[0])
    assert whole[1] == by_character[1] == as_cut[1]
    assert judges[0].windows == judges[1].windows == judges[2].windows
    assert streams[0].verdict == streams[1].verdict == streams[2].verdict
    assert streams[0].flagged_text == streams[1].flagged_text


@given(st.integers(0, 200), st.integers(41, 200), st.integers(1, 40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_long_passage_does_not_leak_its_beginning_once_it_is_suspicious(
    num_before: int, length: int, suspicious_after: int, has_spaces: bool
) -> None:
    """A passage grows suspicious after some of it, and is flagged only with its last character."""
    passage = "".join("B " if has_spaces and i % 5 == 0 else "b" for i in range(length))[:length] + "!"
    text = "a " * num_before + passage + " and more"
    beginning = passage[:suspicious_after]

    judge = Judge(passage, lambda window: 0.4 if beginning in window else 0.0)
    left, is_stopped = received(JudgingFilter(judge), list(text))

    assert is_stopped
    assert len("".join(left)) <= text.index(passage)


def beginning(window: str) -> float:
    """Flagged as long as it is short."""
    return 1.0 if len(window) < 72 else 0.1


def test_a_flagged_beginning_is_held_until_one_knows_what_it_begins() -> None:
    stream = JudgingFilter(Judge("\0never", beginning))
    text = "Pick up the dirty " + "socks and put them where they belong, please. " * 3

    left, is_stopped = received(stream, list(text))

    assert not is_stopped
    assert "".join(left) == text
    assert "".join(left[:72]) == ""
    assert stream.verdict == verdict(0.1)


def test_a_flagged_beginning_stops_an_answer_that_ends_with_it() -> None:
    for length in (1, 23, 24, 48, 71):
        left, is_stopped = received(JudgingFilter(Judge("\0never", beginning)), list("x" * length))
        assert is_stopped
        assert "".join(left) == ""


def test_windows_that_may_stop_an_answer_leave_out_its_first_words() -> None:
    windows = judged_windows("word " * 40)

    assert windows[-1] == "word " * 40
    assert all(len(window) >= BY_DEFAULT.least for window in windows)
    assert judged_windows("two words") == ["two words"]
    assert judged_windows("") == []


def test_the_last_of_a_long_passage_never_leaves_even_if_it_was_not_suspicious() -> None:
    passage = "c" * 150 + "!"
    left, is_stopped = received(JudgingFilter(Judge(passage)), list("a" * 100 + passage + "d" * 100))
    assert is_stopped
    assert len("".join(left)) <= 100 + len(passage) - BY_DEFAULT.hold


def test_what_is_suspicious_is_held_until_it_is_not_any_more() -> None:
    judge = Judge("\0never", lambda window: 0.5 if window.endswith("x ") else 0.1)
    stream = JudgingFilter(judge, FilterOptions(least=0, grid=16, hold=40, window=300))
    stream.feed("a " * 100)
    stream.judge()
    assert len(stream.take().text) == 192 - 40
    stream.feed("x " * 24)
    stream.judge()
    assert stream.take().text == ""
    stream.feed("a " * 8)
    stream.judge()
    assert len(stream.take().text) > 40


def test_what_is_held_grows_no_further_than_the_window() -> None:
    stream = JudgingFilter(Judge("\0never", lambda window: 0.9))
    stream.feed("a " * 500)
    stream.judge()
    assert 1000 - 300 - BY_DEFAULT.grid <= len(stream.take().text) <= 1000 - 300
    stream.end()
    stream.judge()
    assert stream.take().is_complete


@pytest.mark.parametrize(
    ("text", "num_held", "num_left"),
    [
        ("It is a fine day, and we go for a walk in the old park by the sea.", 42, 2),
        ("It is a fine day, and we go for a walk in thunderstorms by the sea.", 42, 2),
        ("It is a fine day, and we walk through thunderstorms by the old sea.", 52, 12),
        ("x" * 60, 48, 8),  # no words
    ],
)
def test_the_first_text_leaves_at_the_first_word_end_behind_what_is_held(
    text: str, num_held: int, num_left: int
) -> None:
    stream = JudgingFilter(Judge("\0never"))
    num_fed, left = 0, ""
    while not left:
        stream.feed(text[num_fed])
        stream.judge()
        num_fed += 1
        left = stream.take().text
    assert (num_fed, left) == (num_held, text[:num_left])


def test_chinese_is_held_a_third_as_long() -> None:
    stream = JudgingFilter(Judge("\0never"))
    stream.feed("天气很好我们去公园散步看看老海边")  # sixteen characters, forty-eight units
    stream.judge()
    assert len(stream.take().text) == 2


def test_a_window_ends_and_begins_at_words_where_there_are_any() -> None:
    judge = Judge("\0never")
    text = "the assessment of cocktails in classical peacocks " * 20
    received(JudgingFilter(judge), list(text))
    words = set(text.split())
    assert {word for window in judge.windows for word in window.split()} == words


def test_no_window_is_longer_than_it_may_be_and_the_number_of_windows_is_linear() -> None:
    judge = Judge("\0never")
    received(JudgingFilter(judge), ["word " * 2000])
    assert max(map(len, judge.windows)) <= BY_DEFAULT.window
    assert len(judge.windows) == -(-10_000 // BY_DEFAULT.grid)


@pytest.mark.parametrize(
    "text", ["x" * 200_000, "炸" * 50_000, "e" + "\u0301" * 100_000, "\ud800" * 5000, "\n" * 100_000]
)
def test_odd_and_long_texts_are_judged_in_pieces_of_a_window(text: str) -> None:
    judge = Judge("\0never")
    left, is_stopped = received(JudgingFilter(judge), [text[i : i + 1500] for i in range(0, len(text), 1500)])
    assert not is_stopped
    assert "".join(left) == text
    assert max(map(len, judge.windows)) <= BY_DEFAULT.window


def test_nothing_leaves_once_the_judge_has_failed() -> None:
    def broken(window: str) -> Verdict:
        raise RuntimeError("no verdict")

    stream = JudgingFilter(broken)
    stream.feed("a" * 60)
    assert stream.is_due
    with pytest.raises(RuntimeError):
        stream.judge()
    stream.feed("more " * 100)
    stream.judge()
    stream.end()
    assert stream.take().text == ""
    assert stream.take().is_stopped
    assert not stream.take().is_complete


def test_what_was_judged_in_the_same_go_as_a_failure_does_not_leave_either() -> None:
    def judge(window: str) -> Verdict:
        if "crash" in window:
            raise RuntimeError("no verdict")
        return verdict(0.0)

    stream = JudgingFilter(judge)
    stream.feed("fine " * 30 + "crash " + "fine " * 30)
    with pytest.raises(RuntimeError):
        stream.judge()
    assert (stream.take().text, stream.is_stopped) == ("", True)


def test_nothing_is_due_before_a_step_of_the_grid_is_complete() -> None:
    judge = Judge("\0never")
    stream = JudgingFilter(judge)
    for _ in range(BY_DEFAULT.grid - 1):
        stream.feed("a")
        assert not stream.is_due
    stream.feed("a")
    assert stream.is_due
    stream.judge()
    assert not stream.is_due
    assert len(judge.windows) == 1


def test_observation_holds_nothing_and_keeps_the_first_flagged_verdict() -> None:
    judge = Judge("bad")
    stream = JudgingFilter(judge, only_observes=True)
    pieces = ["so far so good and then ", "a bad word ", "and another bad word and more " * 5]
    released: list[str] = []
    for piece in pieces:
        stream.feed(piece)
        released.append(stream.take().text)  # before anything was judged
        stream.judge()
    stream.end()
    assert released == pieces
    assert stream.take().is_complete
    assert stream.verdict is not None
    assert stream.verdict.flagged
    assert stream.flagged_text is not None
    assert stream.flagged_text in "".join(pieces)
    num_judged = len(judge.windows)
    stream.judge()
    assert len(judge.windows) == num_judged  # what would have stopped it is known


@given(TEXTS, CUTS)
@settings(max_examples=60, deadline=None)
def test_observation_comes_to_the_verdict_that_blocking_would(text: str, cuts: list[int]) -> None:
    assume(text)
    blocking, observing = (JudgingFilter(Judge("\0never", noise), SMALL, only_observes=only) for only in (False, True))
    received(blocking, list(text))
    for piece in cut(text, cuts):
        observing.feed(piece)
    observing.end()
    observing.judge()
    assert observing.verdict == blocking.verdict
    assert observing.flagged_text == blocking.flagged_text


def test_the_verdict_of_a_text_that_is_not_flagged_is_the_most_severe_one() -> None:
    stream = JudgingFilter(Judge("\0never", lambda window: 0.8 if window.endswith("peak ") else 0.1), SMALL)
    received(stream, ["low " * 5 + "peak " + "low " * 20])
    assert stream.verdict == verdict(0.8)
    assert stream.flagged_text is None


def test_pass_through_releases_every_piece_at_once_and_owes_nothing() -> None:
    stream: StreamFilter = PassThrough()

    assert received(stream, ["a", "", "bc"]) == (["a", "", "bc", ""], False)
    assert stream.verdict is None


@pytest.mark.parametrize(
    "sizes", [{"grid": 2}, {"hold": -1}, {"window": 100}, {"suspicion": 0.0}, {"suspicion": float("nan")}]
)
def test_sizes_that_cannot_hold_a_passage_are_refused(sizes: dict[str, float]) -> None:
    with pytest.raises(ModerationError):
        FilterOptions(**sizes)  # pyright: ignore[reportArgumentType]
