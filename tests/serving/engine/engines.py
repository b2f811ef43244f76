"""Tiny engines and what is read from their events, for tests of what sequences share and how they take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import msgspec

from serving.engine.engine import Engine, EngineLimits
from serving.engine.kv_blocks import KVLayout
from serving.engine.prepare import PreparedModel, prepare
from serving.engine.prompt_lookup import PromptLookup
from serving.engine.requests import EngineEvent, GenerateRequest, SamplingParams, TokenEvent
from tests.serving.engine.tiny import EOS, make_decoder


@cache
def _plain_model() -> PreparedModel:
    return prepare(make_decoder(), exact=True)


def engine_of(
    num_blocks: int = 64,
    *,
    prefix_cache: bool = True,
    prompt_lookup: bool = False,
    int8_kv: bool = False,
    model: PreparedModel | None = None,
    **limits: int,
) -> Engine:
    """On the plain path, unless another model is given."""
    model = model or _plain_model()
    return Engine(
        model,
        kv_bytes=num_blocks * KVLayout.of(model.spec, model.dtype, is_int8=int8_kv).block_bytes,
        tokenizer=None,
        limits=EngineLimits(**limits),
        eos_ids=frozenset({EOS}),
        prefix_cache=prefix_cache,
        prompt_lookup=prompt_lookup,
        int8_kv=int8_kv,
    )


def generate(
    request_id: str,
    prompt: Sequence[int],
    max_tokens: int = 12,
    *,
    num_choices: int = 1,
    salt: str = "",
    adapter: str | None = None,
    **sampling: float,
) -> GenerateRequest:
    params = SamplingParams(max_tokens=max_tokens, temperature=0, seed=7, ignore_eos=True)
    return GenerateRequest(
        request_id=request_id,
        prompt_ids=list(prompt),
        sampling=msgspec.structs.replace(params, **sampling),
        num_choices=num_choices,
        cache_salt=salt,
        adapter=adapter,
    )


def run(engine: Engine, on_step: Callable[[list[EngineEvent]], None] | None = None) -> list[EngineEvent]:
    """Step until nothing is left."""
    events: list[EngineEvent] = []
    while engine.has_work:
        new = engine.step().events
        events += new
        if on_step is not None:
            on_step(new)
    return events


def tokens(events: Sequence[EngineEvent], request_id: str, choice_index: int = 0) -> list[int]:
    return [
        token_id
        for event in events
        if isinstance(event, TokenEvent) and (event.request_id, event.choice_index) == (request_id, choice_index)
        for token_id in event.token_ids
    ]


def reused(events: Sequence[EngineEvent], request_id: str, choice_index: int = 0) -> int:
    """What the finishing event says."""
    (found,) = [
        event.num_reused_tokens
        for event in events
        if isinstance(event, TokenEvent)
        and (event.request_id, event.choice_index) == (request_id, choice_index)
        and event.finish_reason
    ]
    return found


class FixedGuess(PromptLookup):
    """Always the same guess, right or wrong."""

    def __init__(self, guess: Sequence[int]) -> None:
        super().__init__()
        self.fixed = list(guess)

    def guess(self, ids: Sequence[int], count: int) -> list[int]:
        return self.fixed[:count]


def with_guesses(engine: Engine, request: GenerateRequest, guess: Sequence[int]) -> None:
    engine.submit(request)
    for sequence in engine._sequences[request.request_id]:
        sequence.lookup = FixedGuess(guess)


def alone(request: GenerateRequest) -> list[list[int]]:
    """The tokens of every choice, from an engine of its own that shares nothing."""
    engine = engine_of(prefix_cache=False)
    engine.submit(request)
    events = run(engine)
    return [tokens(events, request.request_id, index) for index in range(request.num_choices)]
