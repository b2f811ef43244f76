"""One turn: how updates are joined, what Stop does, and what each ending looks like."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from itertools import pairwise

import pytest

from ui.client import ApiProblem, ChatEvent, Finish, ProblemKind, TextDelta
from ui.conversation import Turn, TurnStats, TurnStatus, messages_to_send
from ui.turn import RunningTurns, StopSwitch, run_turn

pytestmark = pytest.mark.unit


class Clock:
    """Moves by hand."""

    def __init__(self) -> None:
        self.time_s = 100.0

    def __call__(self) -> float:
        return self.time_s


async def stream(*events: ChatEvent | ApiProblem | Callable[[], None]) -> AsyncGenerator[ChatEvent, None]:
    for event in events:
        if isinstance(event, ApiProblem):
            raise event
        if callable(event):
            event()
        else:
            yield event


async def last_of(events: AsyncGenerator[ChatEvent, None], clock: Clock | None = None) -> Turn:
    turns = [turn async for turn in run_turn(Turn("p"), events, StopSwitch(), now=clock or Clock())]
    assert all(turn.status is TurnStatus.RUNNING for turn in turns[:-1])
    return turns[-1]


async def test_a_burst_of_tokens_is_one_update() -> None:
    pieces = [TextDelta("x")] * 500
    turns = [
        turn async for turn in run_turn(Turn("p"), stream(*pieces, Finish("stop", 500)), StopSwitch(), now=Clock())
    ]
    assert len(turns) <= 2
    assert turns[-1].answer == "x" * 500
    assert turns[-1].status is TurnStatus.DONE


async def test_updates_keep_their_distance() -> None:
    now = asyncio.get_running_loop().time
    arriving: asyncio.Queue[ChatEvent] = asyncio.Queue()
    arriving.put_nowait(TextDelta("x"))

    async def events() -> AsyncGenerator[ChatEvent, None]:
        while not isinstance(event := await arriving.get(), Finish):
            yield event
        yield event

    shown_at: list[float] = []
    async for turn in run_turn(Turn("p"), events(), StopSwitch(), now=now, update_interval_s=0.01):
        if turn.status is TurnStatus.RUNNING:
            shown_at.append(now())
            arriving.put_nowait(TextDelta("x") if len(shown_at) < 5 else Finish("stop", 5))
    assert len(shown_at) == 5
    assert min(later - earlier for earlier, later in pairwise(shown_at)) >= 0.009


async def test_figures_count_from_the_first_token_to_the_last() -> None:
    clock = Clock()

    def wait(seconds: float) -> Callable[[], None]:
        def move() -> None:
            clock.time_s += seconds

        return move

    events = stream(wait(0.25), TextDelta("a"), wait(1.0), TextDelta("b"), wait(1.0), TextDelta("c"), Finish("stop", 5))
    turn = await last_of(events, clock)
    assert turn.stats == TurnStats(first_token_s=0.25, tokens=5, tokens_per_s=2.0)


async def test_without_usage_the_pieces_are_counted() -> None:
    turn = await last_of(stream(TextDelta("a"), TextDelta("b"), Finish("stop", None)))
    assert turn.stats is not None
    assert turn.stats.tokens == 2


async def test_stop_closes_the_stream_and_keeps_the_words() -> None:
    switch = StopSwitch()
    is_closed = asyncio.Event()

    async def endless() -> AsyncGenerator[ChatEvent, None]:
        try:
            yield TextDelta("one")
            await asyncio.Event().wait()
        finally:
            is_closed.set()

    turns: list[Turn] = []
    async for turn in run_turn(Turn("p"), endless(), switch, now=Clock()):
        turns.append(turn)
        switch.press()
    assert is_closed.is_set()
    assert turns[-1].answer == "one"
    assert turns[-1].status is TurnStatus.STOPPED


async def test_giving_up_the_turn_closes_the_stream() -> None:
    is_closed = asyncio.Event()

    async def endless() -> AsyncGenerator[ChatEvent, None]:
        try:
            yield TextDelta("one")
            await asyncio.Event().wait()
        finally:
            is_closed.set()

    turns = run_turn(Turn("p"), endless(), StopSwitch(), now=Clock())
    await anext(turns)
    await turns.aclose()
    assert is_closed.is_set()


@pytest.mark.parametrize(
    ("reason", "status"),
    [("stop", TurnStatus.DONE), ("length", TurnStatus.CUT), (None, TurnStatus.FAILED)],
)
async def test_how_it_finished_is_told(reason: str | None, status: TurnStatus) -> None:
    assert (await last_of(stream(TextDelta("a"), Finish(reason, 1)))).status is status


async def test_a_refusal_that_comes_as_text_is_a_notice_not_an_answer() -> None:
    turn = await last_of(stream(TextDelta("I cannot."), Finish("content_filter", 2)))
    assert (turn.status, turn.answer, turn.notice) == (TurnStatus.REFUSED, "", "I cannot.")


async def test_an_answer_whose_rest_is_withheld_keeps_its_words_and_says_why() -> None:
    turn = await last_of(stream(TextDelta("First, "), Finish("content_filter", 9, "The rest was withheld.")))
    assert (turn.status, turn.answer, turn.notice) == (TurnStatus.REFUSED, "First, ", "The rest was withheld.")
    assert [message.content for message in messages_to_send("", [turn], "go on")] == ["go on"]


@pytest.mark.parametrize("kind", list(ProblemKind))
async def test_every_problem_has_a_notice(kind: ProblemKind) -> None:
    turn = await last_of(stream(ApiProblem(kind, "the server's words")))
    assert turn.notice
    assert turn.status is (TurnStatus.REFUSED if kind is ProblemKind.REFUSED else TurnStatus.FAILED)


async def test_a_failure_in_the_middle_keeps_the_words() -> None:
    turn = await last_of(stream(TextDelta("half"), ApiProblem(ProblemKind.UNAVAILABLE, "engine stopped")))
    assert (turn.answer, turn.status) == ("half", TurnStatus.FAILED)


async def test_stopping_a_session_waits_for_its_turn_and_only_its() -> None:
    running = RunningTurns()
    mine, other = running.begin("mine"), running.begin("other")
    stopping = asyncio.create_task(running.stop("mine"))
    await mine.wakeup.wait()
    assert not stopping.done()
    running.end("mine", mine)
    await stopping
    assert mine.requested
    assert not other.requested
    assert not running.is_running("mine")
    await running.stop("nobody")


async def test_the_next_turn_may_begin_once_the_last_word_is_out() -> None:
    running = RunningTurns()
    first = running.begin("page")
    turns = run_turn(Turn("p"), stream(TextDelta("a"), Finish("stop", 1)), first, now=Clock())
    async for turn in turns:
        if turn.status is TurnStatus.DONE:
            assert not running.is_running("page")
    second = running.begin("page")
    running.end("page", first)
    assert running.is_running("page")
    running.end("page", second)
    assert not running.is_running("page")
