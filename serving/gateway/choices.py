"""The state of each choice of one answer: output filter, aligned log-probabilities, what was said so far.

Turns the engine's token events into deltas. Streamed and joined answers are made of the same ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from moderation.stream_filter import StreamFilter
from serving.engine.requests import TokenEvent, TokenLogprob
from serving.gateway.generation import Generation
from serving.gateway.logprobs import LogprobAligner
from serving.gateway.ports import ChoiceRecord, TokenizerPort

FinishReason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one choice has to send. The last one has the finish reason, and why the rest was withheld."""

    index: int
    text: str
    logprobs: Sequence[TokenLogprob] = ()
    finish_reason: FinishReason | None = None
    refusal: str | None = None


class OutputModeration(Protocol):
    """What an answer asks for its choices; `serving.gateway.judging.Moderation` is one."""

    @property
    def withheld_message(self) -> str: ...
    def new_filter(self, choice_index: int) -> StreamFilter: ...
    async def choice_decided(self, choice_index: int, stream_filter: StreamFilter) -> None:
        """Called once for each choice that ended or was stopped, before its end is sent."""
        ...


class Choice:
    """One choice, from its first event to its finish reason.

    `feed` and `take` are cheap. While it `is_due`, `judge` must run, and nothing else of it meanwhile.
    """

    def __init__(
        self, index: int, stream_filter: StreamFilter, aligner: LogprobAligner | None, withheld_message: str
    ) -> None:
        self.index = index
        self.stream_filter = stream_filter
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.refusal: str | None = None
        self._texts: list[str] = []
        self._ended_as: FinishReason | None = None
        self._aligner = aligner
        self._withheld_message = withheld_message

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def is_due(self) -> bool:
        return self.stream_filter.is_due

    @property
    def is_running(self) -> bool:
        """The engine has not ended it."""
        return self._ended_as is None

    @property
    def is_decided(self) -> bool:
        return self.finish_reason is not None and not self.is_due

    def feed(self, events: Sequence[TokenEvent]) -> None:
        if self.finish_reason is not None:
            return  # stopped by the filter; the engine has not noticed yet
        for event in events:
            self.token_ids += event.token_ids
            if self._aligner is not None and event.logprobs:
                self._aligner.add(event.logprobs)
        self.stream_filter.feed("".join([event.text for event in events]))
        self._ended_as = _shown_reason(events[-1])
        if self._ended_as is not None:
            self.stream_filter.end()

    def judge(self) -> None:
        self.stream_filter.judge()

    def take(self) -> ChoiceDelta | None:
        """The delta of what may leave now; None when there is nothing to send yet."""
        if self.finish_reason is not None:
            return None
        released = self.stream_filter.take()
        if released.is_stopped:
            self.finish_reason = "content_filter"
            self.refusal = self._withheld_message
        elif released.is_complete:
            self.finish_reason = self._ended_as
        return self._delta(released.text)

    def _delta(self, text: str) -> ChoiceDelta | None:
        is_last = self.finish_reason is not None
        logprobs: list[TokenLogprob] = []
        if self._aligner is not None:
            logprobs = self._aligner.release(text)
            self.logprobs += logprobs
        if not text and not logprobs and not is_last:
            return None
        self._texts.append(text)
        return ChoiceDelta(self.index, text, logprobs, self.finish_reason, self.refusal)


def _shown_reason(event: TokenEvent) -> FinishReason | None:
    # Clients know no "cancelled": whoever cancelled asked it to stop.
    return "stop" if event.finish_reason == "cancelled" else event.finish_reason


class Answer:
    """All choices of one request over its generation's events."""

    def __init__(
        self,
        generation: Generation,
        tokenizer: TokenizerPort,
        moderation: OutputModeration,
        *,
        has_logprobs: bool,
    ) -> None:
        self._generation = generation
        self._moderation = moderation
        self._decided: set[int] = set()
        self.choices = [
            Choice(
                index,
                moderation.new_filter(index),
                LogprobAligner(tokenizer) if has_logprobs else None,
                moderation.withheld_message,
            )
            for index in range(generation.num_choices)
        ]

    async def deltas(self) -> AsyncIterator[list[ChoiceDelta]]:
        """Everything there is to send, as it comes. Raises what ended the generation or its judging too early."""
        async for batch in self._generation.batches():
            touched = self._feed(batch)
            released = _take(touched)
            due = [choice for choice in touched if choice.is_due]
            if due:
                if released:
                    await self._settle(touched)
                    yield released  # what does not wait for the verdict
                await self._judge(due)
                released = _take(due)
            await self._settle(touched)
            if released:
                yield released

    async def join(self) -> None:
        """Runs to the end; the choices then hold the whole texts."""
        async for _ in self.deltas():
            pass

    def joined(self) -> list[ChoiceDelta]:
        """Every choice as the one delta that all its deltas add up to."""
        return [
            ChoiceDelta(choice.index, choice.text, choice.logprobs, choice.finish_reason, choice.refusal)
            for choice in self.choices
        ]

    def records(self, *, has_text: bool) -> tuple[ChoiceRecord, ...]:
        """`has_text` False: how each choice ended, without a word and without the ids that spell it."""
        return tuple(
            ChoiceRecord(choice.text, tuple(choice.token_ids), choice.finish_reason)
            if has_text
            else ChoiceRecord("", (), choice.finish_reason)
            for choice in self.choices
        )

    @property
    def has_flagged(self) -> bool:
        verdicts = (choice.stream_filter.verdict for choice in self.choices)
        return any(verdict is not None and verdict.flagged for verdict in verdicts)

    def _feed(self, batch: Sequence[TokenEvent]) -> list[Choice]:
        events_of_choices = _by_choice(batch)
        for index, events in events_of_choices:
            self.choices[index].feed(events)
        return [self.choices[index] for index, _ in events_of_choices]

    async def _judge(self, due: Sequence[Choice]) -> None:
        # In a thread: a judgement may take tens of milliseconds, and other requests' streams go on meanwhile.
        try:
            await asyncio.to_thread(_judge_all, due)
        except Exception:
            _take(due)
            await self._settle(due)
            raise

    async def _settle(self, touched: Sequence[Choice]) -> None:
        """Ends in the engine what was stopped here, and tells every choice's outcome once."""
        for choice in touched:
            if not choice.is_decided or choice.index in self._decided:
                continue
            self._decided.add(choice.index)
            if choice.finish_reason == "content_filter" and choice.is_running:
                await self._generation.cancel_choice(choice.index)
            await self._moderation.choice_decided(choice.index, choice.stream_filter)


def _judge_all(choices: Sequence[Choice]) -> None:
    for choice in choices:
        choice.judge()


def _take(choices: Sequence[Choice]) -> list[ChoiceDelta]:
    return [delta for choice in choices if (delta := choice.take()) is not None]


def _by_choice(batch: Sequence[TokenEvent]) -> list[tuple[int, list[TokenEvent]]]:
    if len(batch) == 1:
        return [(batch[0].choice_index, list(batch))]
    events: dict[int, list[TokenEvent]] = {}
    for event in batch:
        events.setdefault(event.choice_index, []).append(event)
    return list(events.items())
