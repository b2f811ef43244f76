"""Runs one turn: sends the conversation, gathers what streams back and hands out the turn as it grows.

Bursts of tokens are joined into at most 25 updates a second: each update costs the page far more than a token costs
the engine. Stop hangs up on the API, which stops the engine; what has arrived stays. Called by `ui.page`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace

from ui.client import ApiProblem, ChatEvent, Finish, ProblemKind, TextDelta
from ui.conversation import Turn, TurnStats, TurnStatus

__all__ = ["RunningTurns", "StopSwitch", "run_turn"]

UPDATE_INTERVAL_S = 0.04

_NOTICES: dict[ProblemKind, str] = {
    ProblemKind.REFUSED: (
        "I can't help with that one: the safety filter on this server flagged the message. It was not shown to the "
        "model and will not be sent again. You can edit it, or carry on with something else."
    ),
    ProblemKind.BUSY: "The server is busy with other conversations right now. Please try again in a moment.",
    ProblemKind.KEY: "The server did not accept the access key. Reload the page to enter it again.",
    ProblemKind.TOO_LONG: "This conversation no longer fits into what the model can read. Start a new chat to go on.",
    ProblemKind.UNAVAILABLE: "The engine is starting up again. It is usually back within seconds; then press retry.",
    ProblemKind.INVALID: "The server did not accept the request.",
    ProblemKind.UNREACHABLE: "The server cannot be reached. Is it still running?",
    ProblemKind.BROKEN: "Something went wrong while answering.",
}
_WITH_DETAIL = frozenset({ProblemKind.INVALID, ProblemKind.BROKEN, ProblemKind.TOO_LONG})


@dataclass(slots=True)
class StopSwitch:
    """Set by the Stop button while `run_turn` waits on it.

    `is_answered` comes before `ended`: the browser may send the next prompt as soon as it sees the end of this one,
    while what waits for the turn to end must not overtake its last update.
    """

    requested: bool = False
    is_answered: bool = False
    wakeup: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def press(self) -> None:
        self.requested = True
        self.wakeup.set()


class RunningTurns:
    """The turn each open page is waiting for; at most one a page."""

    def __init__(self) -> None:
        self._switch_of_session: dict[str, StopSwitch] = {}

    def is_running(self, session: str) -> bool:
        switch = self._switch_of_session.get(session)
        return switch is not None and not switch.is_answered

    def begin(self, session: str) -> StopSwitch:
        assert not self.is_running(session)
        switch = self._switch_of_session[session] = StopSwitch()
        return switch

    def end(self, session: str, switch: StopSwitch) -> None:
        switch.ended.set()
        if self._switch_of_session.get(session) is switch:
            del self._switch_of_session[session]

    def press_stop(self, session: str) -> None:
        if switch := self._switch_of_session.get(session):
            switch.press()

    async def stop(self, session: str) -> None:
        """Presses Stop and waits for the turn to end; returns at once when none is running."""
        if switch := self._switch_of_session.get(session):
            switch.press()
            await switch.ended.wait()


@dataclass(slots=True)
class _Arrivals:
    """What the stream has delivered so far, with the times that the statistics need."""

    started_at: float
    pieces: list[str] = field(default_factory=list[str])
    first_at: float | None = None
    last_at: float = 0.0
    finish: Finish | None = None
    problem: ApiProblem | None = None
    ended: bool = False

    def add(self, text: str, now: float) -> None:
        self.first_at = now if self.first_at is None else self.first_at
        self.last_at = now
        self.pieces.append(text)

    def stats(self) -> TurnStats | None:
        if self.first_at is None:
            return None
        counted = self.finish.completion_tokens if self.finish else None
        tokens = counted or len(self.pieces)
        duration_s = self.last_at - self.first_at
        rate = (tokens - 1) / duration_s if tokens > 1 and duration_s > 0 else None
        return TurnStats(self.first_at - self.started_at, tokens, rate)


async def run_turn(
    turn: Turn,
    events: AsyncGenerator[ChatEvent, None],
    switch: StopSwitch,
    *,
    now: Callable[[], float],
    update_interval_s: float = UPDATE_INTERVAL_S,
) -> AsyncGenerator[Turn, None]:
    """The turn each time it has grown, at most once per interval; the last one is no longer running.

    Closing this generator, like pressing the switch, closes `events`.
    """
    arrivals = _Arrivals(started_at=now())
    reader = asyncio.create_task(_read(events, arrivals, switch, now))
    try:
        while not (arrivals.ended or switch.requested):
            await switch.wakeup.wait()
            switch.wakeup.clear()
            if arrivals.pieces and not (arrivals.ended or switch.requested):
                turn = replace(turn, answer="".join(arrivals.pieces), stats=arrivals.stats())
                yield turn
                await asyncio.sleep(update_interval_s)
    finally:
        reader.cancel()
        with suppress(asyncio.CancelledError):
            await reader
    switch.is_answered = True
    yield _finished(turn, arrivals, stopped=switch.requested and not arrivals.ended)


async def _read(
    events: AsyncGenerator[ChatEvent, None], arrivals: _Arrivals, switch: StopSwitch, now: Callable[[], float]
) -> None:
    try:
        async with aclosing(events):
            async for event in events:
                if isinstance(event, TextDelta):
                    arrivals.add(event.text, now())
                else:
                    arrivals.finish = event
                switch.wakeup.set()
    except ApiProblem as problem:
        arrivals.problem = problem
    arrivals.ended = True
    switch.wakeup.set()


def _finished(turn: Turn, arrivals: _Arrivals, *, stopped: bool) -> Turn:
    turn = replace(turn, answer="".join(arrivals.pieces), stats=arrivals.stats())
    if stopped:
        return replace(turn, status=TurnStatus.STOPPED)
    if arrivals.problem is not None:
        return _failed(turn, arrivals.problem)
    reason = arrivals.finish.reason if arrivals.finish else None
    if arrivals.finish and arrivals.finish.refusal:
        # The server withheld the rest; what has arrived was judged and stays, but is not sent again.
        return replace(turn, status=TurnStatus.REFUSED, notice=arrivals.finish.refusal)
    if reason == "content_filter":
        # The server is set to answer with a refusal; its sentence is the notice, not something the model said.
        return replace(turn, answer="", status=TurnStatus.REFUSED, notice=turn.answer or _NOTICES[ProblemKind.REFUSED])
    if reason is None:
        return replace(turn, status=TurnStatus.FAILED, notice="The answer broke off before its end.")
    return replace(turn, status=TurnStatus.CUT if reason == "length" else TurnStatus.DONE)


def _failed(turn: Turn, problem: ApiProblem) -> Turn:
    if problem.kind is ProblemKind.REFUSED:
        return replace(turn, answer="", stats=None, status=TurnStatus.REFUSED, notice=_NOTICES[problem.kind])
    notice = _NOTICES[problem.kind]
    if problem.kind in _WITH_DETAIL:
        notice = f"{notice} ({problem.message})"
    elif problem.kind is ProblemKind.BUSY and problem.retry_after_s:
        notice = f"The server is busy with other conversations. Please try again in {problem.retry_after_s} s."
    return replace(turn, status=TurnStatus.FAILED, notice=notice)
