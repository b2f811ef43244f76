"""The last steps of a chat and of a completion, which are the same: joined or streamed, then recorded.

A streamed answer waits a moment for its first event, so that what fails at once still gets a status code of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from moderation.policy import Turn, Verdict
from serving.errors import ServiceError, UnknownModel
from serving.gateway.auth import key_name_of
from serving.gateway.choices import Answer, ChoiceDelta
from serving.gateway.disconnect import unless_client_gone
from serving.gateway.error_responses import json_response
from serving.gateway.fields import JsonObject
from serving.gateway.generation import Generation, Usage
from serving.gateway.judging import REFUSAL, Moderation, flagged_error
from serving.gateway.ports import ServedModel, Services, TurnRecord
from serving.gateway.schemas import StreamRequest
from serving.gateway.sse import DONE, ChunkWriter, EventStreamResponse, error_event

_FIRST_EVENT_WAIT_S = 5.0
# Longer texts are tokenised in a thread: tokenising them would hold up every stream.
_INLINE_CHARACTERS = 20_000

logger = logging.getLogger(__name__)

T = TypeVar("T")


class AnswerShape(Protocol):
    """How the choices of one endpoint look on the wire."""

    def writer(self) -> ChunkWriter: ...
    def opening(self, writer: ChunkWriter, index: int) -> bytes:
        """What a streamed choice begins with."""
        ...

    def joined(self, choices: Sequence[ChoiceDelta], usage: Usage) -> JsonObject: ...


@dataclass(frozen=True, slots=True)
class TurnContext:
    """What the record of a turn needs besides the answer."""

    request_id: str
    model: ServedModel
    moderation: Moderation
    turns: tuple[Turn, ...]
    verdict: Verdict | None
    prompt_ids: tuple[int, ...] = ()


def check_model_name(model: ServedModel, asked: str) -> None:
    """Raises UnknownModel for a name that is not the served model's."""
    if asked != model.model_id:
        message = f"the model {asked[:100]!r} does not exist; this server has {model.model_id!r}"
        raise UnknownModel(message, param="model")


def max_context(services: Services, model: ServedModel) -> int:
    """Tokens that a prompt and its answer share: the model's positions or the cache, whichever is smaller."""
    engine_limit = services.engine.max_context
    return model.max_context if engine_limit is None else min(model.max_context, engine_limit)


def cache_salt(request: Request, services: Services) -> str:
    """Whoever has the same finds in the cache what others left of a prompt: one key's requests, or everybody's.

    How fast an answer starts, and `cached_tokens`, tell whether a prompt was known.
    """
    key_name = key_name_of(request)
    return "" if key_name is None or services.settings.shares_prefix_cache else f"key:{key_name}"


async def tokenize(encode: Callable[[], T], num_characters: int) -> T:
    return encode() if num_characters <= _INLINE_CHARACTERS else await asyncio.to_thread(encode)


async def refuse(
    services: Services, shape: AnswerShape, stream: StreamRequest, turn: TurnContext, num_choices: int, param: str
) -> Response:
    """Flagged input: an error before any byte, or by setting an answer that says so."""
    assert turn.verdict is not None
    await _record(services, turn, None)
    rules = turn.moderation.rules
    if rules.on_flagged == "error":
        raise flagged_error(turn.verdict, param, rules.message)
    text = rules.message or REFUSAL
    refusals = [ChoiceDelta(index, text, finish_reason="content_filter") for index in range(num_choices)]
    nothing_used = Usage(0, 0)
    if not stream.is_streamed:
        return json_response(shape.joined(refusals, nothing_used))
    writer = shape.writer()
    chunks = [shape.opening(writer, delta.index) + writer.delta(delta) for delta in refusals]
    body = b"".join([*chunks, writer.usage(nothing_used), DONE])
    return Response(body, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def respond(
    request: Request,
    services: Services,
    generation: Generation,
    answer: Answer,
    shape: AnswerShape,
    stream: StreamRequest,
    turn: TurnContext,
) -> Response:
    """Takes the generation over: it is closed when the answer is out or nobody waits for it any more."""
    try:
        if not stream.is_streamed:
            return await _respond_joined(request, services, generation, answer, shape, turn)
        await unless_client_gone(request, generation.wait_for_first(_FIRST_EVENT_WAIT_S))
    except BaseException:
        generation.close()
        raise
    return EventStreamResponse(
        _events(services, generation, answer, shape, turn),
        ping_interval_s=services.settings.ping_interval_s,
        on_end=generation.close,
        on_shutdown=lambda: generation.fail(ServiceError("the server is shutting down")),
    )


async def _respond_joined(
    request: Request,
    services: Services,
    generation: Generation,
    answer: Answer,
    shape: AnswerShape,
    turn: TurnContext,
) -> Response:
    await unless_client_gone(request, answer.join())
    generation.close()
    await _record(services, turn, answer)
    return json_response(shape.joined(answer.joined(), generation.usage))


async def _events(
    services: Services, generation: Generation, answer: Answer, shape: AnswerShape, turn: TurnContext
) -> AsyncIterator[bytes]:
    """Openings, chunks, one end per choice, usage, `[DONE]`; after a failure an error and `[DONE]`."""
    writer = shape.writer()
    yield b"".join([shape.opening(writer, index) for index in range(generation.num_choices)])
    try:
        async for deltas in answer.deltas():
            yield b"".join([writer.delta(delta) for delta in deltas])
    except ServiceError as error:
        yield error_event(error) + DONE
        return
    yield writer.usage(generation.usage) + DONE
    await _record(services, turn, answer)


async def _record(services: Services, turn: TurnContext, answer: Answer | None) -> None:
    """What was flagged is recorded without its text, unless the rules allow it."""
    is_flagged = (turn.verdict is not None and turn.verdict.flagged) or (answer is not None and answer.has_flagged)
    has_text = turn.moderation.rules.records_text or not is_flagged
    record = TurnRecord(
        request_id=turn.request_id,
        model_id=turn.model.model_id,
        turns=turn.turns if has_text else (),
        verdict=turn.verdict,
        prompt_ids=turn.prompt_ids if has_text else (),
        choices=() if answer is None else answer.records(has_text=has_text),
    )
    try:
        await services.sink.record(record)
    except Exception:
        logger.exception("turn_not_recorded request=%s", turn.request_id)
