"""Log-probabilities of a prompt's own tokens, by score requests: what `echo` with `logprobs` shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serving.engine.requests import FailedEvent, ScoreEvent, ScoreRequest, TokenLogprob
from serving.errors import EngineStopped
from serving.gateway.error_responses import error_of_event
from serving.gateway.ports import EnginePort


@dataclass(frozen=True, slots=True)
class PromptText:
    text: str
    ids: list[int]


async def score_prompts(
    engine: EnginePort, request_id: str, prompts: Sequence[PromptText], num_top_logprobs: int, cache_salt: str
) -> list[list[TokenLogprob | None]]:
    """One list per prompt, one entry per token; nothing precedes the first, so its entry is None."""
    return [
        [None, *await _score(engine, f"{request_id}.score{index}", prompt.ids, num_top_logprobs, cache_salt)]
        for index, prompt in enumerate(prompts)
    ]


async def _score(
    engine: EnginePort, request_id: str, ids: list[int], num_top_logprobs: int, cache_salt: str
) -> list[TokenLogprob]:
    if len(ids) < 2:
        return []
    stream = engine.submit(
        ScoreRequest(request_id=request_id, ids=ids, num_top_logprobs=num_top_logprobs, cache_salt=cache_salt)
    )
    try:
        async for event in stream:
            if isinstance(event, ScoreEvent):
                return event.logprobs
            if isinstance(event, FailedEvent):
                raise error_of_event(event)
    finally:
        await stream.aclose()
    raise EngineStopped("the engine ended the score request without an answer", retry_after_s=1)
