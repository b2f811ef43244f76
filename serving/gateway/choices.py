"""The state of each choice of one answer: output filter, aligned log-probabilities, what was said so far.

Turns the engine's token events into deltas. Streamed and joined answers are made of the same ones.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from moderation.stream_filter import StreamFilter
from serving.engine.requests import TokenEvent, TokenLogprob
from serving.gateway.generation import Generation
from serving.gateway.logprobs import LogprobAligner
from serving.gateway.ports import ChoiceRecord, TokenizerPort

FinishReason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one choice has to send. The last one has the finish reason."""

    index: int
    text: str
    logprobs: Sequence[TokenLogprob] = ()
    finish_reason: FinishReason | None = None


class Choice:
    """One choice, from its first event to its finish reason."""

    def __init__(self, index: int, stream_filter: StreamFilter, aligner: LogprobAligner | None) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self._texts: list[str] = []
        self._filter = stream_filter
        self._aligner = aligner

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def apply(self, events: Sequence[TokenEvent]) -> ChoiceDelta | None:
        """The delta of events that came together; None when they leave nothing to send yet."""
        if self.finish_reason is not None:
            return None  # stopped by the filter; the engine has not noticed yet
        for event in events:
            self.token_ids += event.token_ids
            if self._aligner is not None and event.logprobs:
                self._aligner.add(event.logprobs)
        finish = _shown_reason(events[-1])
        text, is_stopped = self._release("".join([event.text for event in events]), is_last=finish is not None)
        self.finish_reason = "content_filter" if is_stopped else finish
        return self._delta(text)

    def _release(self, text: str, *, is_last: bool) -> tuple[str, bool]:
        released = self._filter.feed(text)
        if is_last and not released.is_stopped:
            rest = self._filter.finish()
            return released.text + rest.text, rest.is_stopped
        return released.text, released.is_stopped

    def _delta(self, text: str) -> ChoiceDelta | None:
        is_last = self.finish_reason is not None
        logprobs: list[TokenLogprob] = []
        if self._aligner is not None:
            is_cut = self.finish_reason != "length"
            logprobs = self._aligner.release(text, is_last=is_last, is_cut=is_cut)
            self.logprobs += logprobs
        if not text and not logprobs and not is_last:
            return None
        self._texts.append(text)
        return ChoiceDelta(self.index, text, logprobs, self.finish_reason)


def _shown_reason(event: TokenEvent) -> FinishReason | None:
    # Clients know no "cancelled": whoever cancelled asked it to stop.
    return "stop" if event.finish_reason == "cancelled" else event.finish_reason


class Answer:
    """All choices of one request over its generation's events."""

    def __init__(
        self,
        generation: Generation,
        tokenizer: TokenizerPort,
        new_filter: Callable[[], StreamFilter],
        *,
        has_logprobs: bool,
    ) -> None:
        self._generation = generation
        self.choices = [
            Choice(index, new_filter(), LogprobAligner(tokenizer) if has_logprobs else None)
            for index in range(generation.num_choices)
        ]

    async def deltas(self) -> AsyncIterator[list[ChoiceDelta]]:
        """Everything there is to send, as it comes. Raises what ended the generation too early."""
        async for batch in self._generation.batches():
            deltas = [delta for index, events in _by_choice(batch) if (delta := self.choices[index].apply(events))]
            for delta in deltas:
                if delta.finish_reason == "content_filter":
                    await self._generation.cancel_choice(delta.index)
            if deltas:
                yield deltas

    async def join(self) -> None:
        """Runs to the end; the choices then hold the whole texts."""
        async for _ in self.deltas():
            pass

    def joined(self) -> list[ChoiceDelta]:
        """Every choice as the one delta that all its deltas add up to."""
        return [
            ChoiceDelta(choice.index, choice.text, choice.logprobs, choice.finish_reason) for choice in self.choices
        ]

    def records(self) -> tuple[ChoiceRecord, ...]:
        return tuple(
            ChoiceRecord(choice.text, tuple(choice.token_ids), choice.finish_reason) for choice in self.choices
        )


def _by_choice(batch: Sequence[TokenEvent]) -> list[tuple[int, list[TokenEvent]]]:
    if len(batch) == 1:
        return [(batch[0].choice_index, list(batch))]
    events: dict[int, list[TokenEvent]] = {}
    for event in batch:
        events.setdefault(event.choice_index, []).append(event)
    return list(events.items())
