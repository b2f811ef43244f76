"""One API request at work in the engine: submitted, its events gathered, cancelled when nobody wants them any more.

The routes read `batches()`; everything that arrived while the last chunk was being sent comes as one batch. Closing a
generation before its end cancels what is left of it in the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from msgspec import structs

from serving.engine.requests import EngineEvent, FailedEvent, GenerateRequest, SamplingParams, TokenEvent
from serving.errors import EngineStopped, ServiceError
from serving.gateway.error_responses import error_of_event
from serving.gateway.ports import EnginePort, EventStream
from serving.gateway.request_context import RequestContext
from serving.metrics import Metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Usage:
    """`cached_tokens`: those of the prompt that were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Generation:
    """`prompts` times `num_choices` sequences; choice `i` of prompt `p` has index `p * num_choices + i`."""

    def __init__(
        self,
        context: RequestContext,
        prompts: Sequence[list[int]],
        sampling: Sequence[SamplingParams],
        num_choices: int,
        cache_salt: str,
        owner: Generations,
    ) -> None:
        self.request_id = context.request_id
        self.num_choices = num_choices * len(prompts)
        self._requests = [
            GenerateRequest(
                request_id=f"{context.request_id}.{index}",
                prompt_ids=prompt,
                sampling=params,
                num_choices=num_choices,
                cache_salt=cache_salt,
            )
            for index, (prompt, params) in enumerate(zip(prompts, sampling, strict=True))
        ]
        self._num_choices_per_prompt = num_choices
        self._num_prompt_tokens = sum(len(prompt) for prompt in prompts)
        self._num_generated_tokens = 0
        self._num_cached_tokens: dict[int, int] = {}  # by the first choice of each prompt
        self._arrived_at = context.arrived_at
        self._owner = owner
        self._events: list[TokenEvent] = []
        self._wake = asyncio.Event()
        self._pumps: list[asyncio.Task[None]] = []
        self._not_begun: list[EventStream] = []
        self._open_choices = set(range(self.num_choices))
        self._failure: ServiceError | None = None
        self._finish_reasons: set[str] = set()
        self._first_token_s: float | None = None
        self._last_token_at: dict[int, float] = {}
        self._is_closed = False

    @property
    def usage(self) -> Usage:
        return Usage(self._num_prompt_tokens, self._num_generated_tokens, sum(self._num_cached_tokens.values()))

    @property
    def is_finished(self) -> bool:
        return not self._open_choices or self._failure is not None

    def submit(self) -> None:
        """Submits every prompt or none. Raises QueueFull or EngineStopped."""
        for index, request in enumerate(self._requests):
            try:
                stream = self._owner.engine.submit(request)
            except ServiceError as error:
                self.fail(error)
                self.close()
                raise
            self._not_begun.append(stream)
            self._pumps.append(asyncio.create_task(self._pump(stream, index * self._num_choices_per_prompt)))
        self._owner.metrics.prompt_accepted(self._num_prompt_tokens)

    async def wait_for_first(self, timeout_s: float) -> None:
        """Returns when there is something to send, or after `timeout_s`. Raises what ended it before any token."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), timeout_s)
        if self._failure is not None and not self._events:
            raise self._failure

    async def batches(self) -> AsyncIterator[list[TokenEvent]]:
        """Events as they come, `choice_index` counted over all prompts. Raises what ended it too early."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch, self._events = self._events, []
            if batch:
                yield batch
            if self._events:
                continue  # arrived while the batch was being sent
            if self._failure is not None:
                raise self._failure
            if not self._open_choices:
                return

    async def cancel(self) -> bool:
        """Asks the engine to end it; the reader then sees every choice finish. False: nothing was left to end."""
        answers = [await self._owner.engine.cancel(request.request_id) for request in self._requests]
        if any(answers):
            self._owner.metrics.cancelled()
        return any(answers)

    async def cancel_choice(self, choice_index: int) -> None:
        prompt_index, index = divmod(choice_index, self._num_choices_per_prompt)
        await self._owner.engine.cancel(self._requests[prompt_index].request_id, index)

    def fail(self, error: ServiceError) -> None:
        """Ends it for the reader with `error`, after what has arrived."""
        if not self.is_finished:
            self._failure = error
            self._wake.set()

    def close(self) -> None:
        """The reader is done with it. Whatever still runs is cancelled in the engine."""
        if self._is_closed:
            return
        self._is_closed = True
        if not self.is_finished:
            self._owner.metrics.disconnected()
            self._finish_reasons.add("disconnect")
        for pump in self._pumps:
            pump.cancel()
        # A task that is cancelled before it began does not run its `finally`.
        self._pumps += [asyncio.create_task(stream.aclose()) for stream in self._not_begun]
        self._owner.discard(self)
        self._log_end()

    async def _pump(self, stream: EventStream, first_choice: int) -> None:
        self._not_begun.remove(stream)
        try:
            async for event in stream:
                self._receive(event, first_choice)
            self._check_complete(first_choice)
        except ServiceError as error:
            self.fail(error)
        except Exception:
            logger.exception("engine_stream_broken request=%s", self.request_id)
            self.fail(ServiceError("internal error while reading the engine's answer"))
        finally:
            await stream.aclose()

    def _receive(self, event: EngineEvent, first_choice: int) -> None:
        if isinstance(event, FailedEvent):
            self.fail(error_of_event(event))
        elif isinstance(event, TokenEvent):
            self._receive_tokens(event, first_choice + event.choice_index)

    def _receive_tokens(self, event: TokenEvent, choice_index: int) -> None:
        if event.token_ids:
            self._observe(choice_index, len(event.token_ids))
        if event.choice_index == 0:  # the others also find what the first one has just computed
            self._num_cached_tokens[choice_index] = event.num_reused_tokens
        if event.finish_reason is not None:
            self._finish_reasons.add(event.finish_reason)
            self._open_choices.discard(choice_index)
        is_counted_alike = choice_index == event.choice_index
        self._events.append(event if is_counted_alike else structs.replace(event, choice_index=choice_index))
        self._wake.set()

    def _observe(self, choice_index: int, num_tokens: int) -> None:
        metrics, now = self._owner.metrics, self._owner.clock()
        self._num_generated_tokens += num_tokens
        metrics.tokens_generated(num_tokens)
        if self._first_token_s is None:
            self._first_token_s = now - self._arrived_at
            metrics.observe_first_token(self._first_token_s)
        last = self._last_token_at.get(choice_index)
        if last is not None:
            metrics.observe_between_tokens((now - last) / num_tokens)
        self._last_token_at[choice_index] = now

    def _check_complete(self, first_choice: int) -> None:
        mine = range(first_choice, first_choice + self._num_choices_per_prompt)
        if not self._open_choices.isdisjoint(mine):
            self.fail(EngineStopped("the engine ended the answer too early", retry_after_s=1))

    def _log_end(self) -> None:
        reason = self._failure.code or "error" if self._failure is not None else "+".join(sorted(self._finish_reasons))
        logger.info(
            "request_finished request=%s tokens_in=%d tokens_out=%d ttft_ms=%s total_ms=%.0f reason=%s",
            self.request_id,
            self._num_prompt_tokens,
            self._num_generated_tokens,
            "-" if self._first_token_s is None else f"{self._first_token_s * 1000:.0f}",
            (self._owner.clock() - self._arrived_at) * 1000,
            reason,
        )


class Generations:
    """Starts them and knows those in flight: what a cancel call can reach."""

    def __init__(self, engine: EnginePort, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self.engine = engine
        self.metrics = metrics
        self.clock = clock
        self._in_flight: dict[str, Generation] = {}

    def start(
        self,
        context: RequestContext,
        prompts: Sequence[list[int]],
        sampling: Sequence[SamplingParams],
        num_choices: int,
        cache_salt: str,
    ) -> Generation:
        """Submits; the caller closes what it gets. Raises QueueFull or EngineStopped."""
        generation = Generation(context, prompts, sampling, num_choices, cache_salt, self)
        generation.submit()
        self._in_flight[generation.request_id] = generation
        return generation

    def get(self, request_id: str) -> Generation | None:
        return self._in_flight.get(request_id)

    def discard(self, generation: Generation) -> None:
        self._in_flight.pop(generation.request_id, None)
