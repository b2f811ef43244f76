"""With the native step, what sequences share changes not a bit: prefixes, preemption, guesses, neighbours."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch

from quant.native.library import load_library
from serving.engine.engine import Engine
from serving.engine.prepare import PreparedModel, prepare
from serving.engine.requests import (
    EngineEvent,
    GenerateRequest,
    PoolEvent,
    PoolRequest,
    ScoreEvent,
    ScoreRequest,
    TokenEvent,
)
from tests.serving.engine.engines import engine_of, generate, reused, run, tokens, with_guesses
from tests.serving.engine.tiny import NATIVE_SPEC, prompt_of, quantized_decoder

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(load_library() is None, reason="no native kernels on this machine"),
]

SHARED = prompt_of(100, seed=9)
REPEATING = prompt_of(12, seed=3) * 4
both_caches = pytest.mark.parametrize("int8_kv", [False, True], ids=["bfloat16 cache", "int8 cache"])


@cache
def native_model() -> PreparedModel:
    model = prepare(quantized_decoder(NATIVE_SPEC), exact=False)
    assert model.native is not None
    return model


def native_engine(
    num_blocks: int = 64,
    *,
    prefix_cache: bool = True,
    prompt_lookup: bool = False,
    int8_kv: bool = False,
    **limits: int,
) -> Engine:
    return engine_of(
        num_blocks,
        prefix_cache=prefix_cache,
        prompt_lookup=prompt_lookup,
        int8_kv=int8_kv,
        model=native_model(),
        **limits,
    )


def ask(engine: Engine, *requests: GenerateRequest | ScoreRequest | PoolRequest) -> list[EngineEvent]:
    for request in requests:
        engine.submit(request)
    return run(engine)


def said(events: list[EngineEvent], request_id: str, choice_index: int = 0) -> list[tuple[int, float]]:
    """Ids with their log-probabilities."""
    return [
        (item.token_id, item.logprob)
        for event in events
        if isinstance(event, TokenEvent) and (event.request_id, event.choice_index) == (request_id, choice_index)
        for item in event.logprobs or ()
    ]


def said_alone(request: GenerateRequest, *, int8_kv: bool = False) -> list[list[tuple[int, float]]]:
    """Of every choice, from an engine that shares nothing and takes the whole prompt in one chunk."""
    events = ask(native_engine(prefix_cache=False, int8_kv=int8_kv), request)
    return [said(events, request.request_id, index) for index in range(request.num_choices)]


@both_caches
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("max_step_tokens", [256, 24])
def test_a_seeded_second_turn_is_the_same_cached_and_not(
    num_threads: int, max_step_tokens: int, *, int8_kv: bool
) -> None:
    """What was found ends nowhere near a border of the uncached prompt's chunks, and half of it was decoded."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        engine = native_engine(max_step_tokens=max_step_tokens, int8_kv=int8_kv)
        first = generate("a", SHARED[:40], 30, temperature=1)
        answer = tokens(ask(engine, first), "a")
        second = generate(
            "b", [*first.prompt_ids, *answer, *prompt_of(30, seed=4)], 40, temperature=1, num_top_logprobs=0
        )
        events = ask(engine, second)
        assert reused(events, "b") == 64
        assert [said(events, "b")] == said_alone(second, int8_kv=int8_kv)
    finally:
        torch.set_num_threads(before)


@both_caches
@pytest.mark.parametrize("prompt_lookup", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_everything_shared_is_the_same_alone(seed: int, prompt_lookup: bool, *, int8_kv: bool) -> None:
    """Conversations that branch, n choices, arrivals in the middle, small chunks, a cache so small that all fight."""
    rng = random.Random(seed)
    engine = native_engine(
        14, max_step_tokens=rng.choice([5, 16, 40, 256]), prompt_lookup=prompt_lookup, int8_kv=int8_kv
    )
    known = [SHARED[:20], SHARED[:50], REPEATING]
    asked: list[GenerateRequest] = []
    events: list[EngineEvent] = []
    for number in range(12):
        beginning = rng.choice(known)
        prompt = (beginning + prompt_of(rng.randrange(1, 30), seed=rng.randrange(3)))[: rng.randrange(1, 130)]
        request = generate(
            f"r{number}",
            prompt,
            rng.randrange(1, 25),
            num_choices=rng.choice([1, 1, 3]),
            temperature=rng.choice([0, 1]),
            num_top_logprobs=0,
        )
        asked.append(request)
        engine.submit(request)
        for _ in range(rng.randrange(6)):
            events += engine.step().events
        known += [prompt, prompt + tokens(events, request.request_id)]
    events += run(engine)
    for request in asked:
        found = [said(events, request.request_id, index) for index in range(request.num_choices)]
        assert found == said_alone(request, int8_kv=int8_kv)
    stats = engine.stats()
    assert stats.num_reused_tokens > 0
    assert (stats.num_guessed_tokens > 0) == prompt_lookup
    assert stats.num_free_blocks == stats.num_total_blocks


@both_caches
@pytest.mark.parametrize("prompt_lookup", [False, True])
def test_who_was_preempted_goes_on_with_the_same_bits(prompt_lookup: bool, *, int8_kv: bool) -> None:
    requests = [
        generate(f"r{i}", prompt_of(5 + i, seed=i) * 3, 50, temperature=0.3 * (i % 2), num_top_logprobs=0)
        for i in range(4)
    ]
    engine = native_engine(9, prompt_lookup=prompt_lookup, int8_kv=int8_kv, max_step_tokens=24)
    events = ask(engine, *requests)
    assert engine.stats().num_preemptions > 0
    for request in requests:
        assert [said(events, request.request_id)] == said_alone(request, int8_kv=int8_kv)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("num_right", range(5))
def test_guesses_right_and_wrong_change_no_bit(temperature: float, num_right: int) -> None:
    request = generate("a", SHARED[:20], 40, temperature=temperature, num_top_logprobs=0)
    (expected,) = said_alone(request)
    ids = [token_id for token_id, _ in expected[1:5]]
    engine = native_engine()
    with_guesses(engine, request, [*ids[:num_right], *[(token_id + 1) % 97 for token_id in ids[num_right:]]])
    assert said(run(engine), "a") == expected
    stats = engine.stats()
    assert num_right <= stats.num_guessed_right <= stats.num_guessed_tokens
    assert num_right == 4 or stats.num_guessed_right < stats.num_guessed_tokens


@both_caches
def test_a_neighbour_with_an_adapter_changes_nothing(*, int8_kv: bool) -> None:
    """Its rows go through torch, those of the others do not follow it there."""
    name = "model.layers.0.self_attn.q_proj"
    adapter = {f"{name}.lora_A.weight": torch.ones(2, 64), f"{name}.lora_B.weight": torch.ones(192, 2)}
    engine = native_engine(int8_kv=int8_kv)
    engine.set_adapter("a", adapter, version=1)
    plain = [generate(f"r{i}", prompt_of(20 + i, seed=i), 20, temperature=1, num_top_logprobs=0) for i in range(2)]
    adapted = generate("adapted", SHARED, 20, adapter="a", num_top_logprobs=0)
    events = ask(engine, plain[0], adapted, plain[1])
    for request in plain:
        assert [said(events, request.request_id)] == said_alone(request, int8_kv=int8_kv)
    other = native_engine(int8_kv=int8_kv)
    other.set_adapter("a", adapter, version=1)
    expected = said(ask(other, adapted), "adapted")
    (unadapted,) = said_alone(generate("adapted", SHARED, 20, num_top_logprobs=0), int8_kv=int8_kv)
    assert [value for _, value in said(events, "adapted")] == pytest.approx([v for _, v in expected], abs=0.05)
    assert expected != unadapted


def test_score_and_pool_are_the_same_in_a_crowd_after_a_prefix_and_alone() -> None:
    score, pool = ScoreRequest(request_id="s", ids=SHARED), PoolRequest(request_id="p", ids=SHARED)
    engine = native_engine(max_step_tokens=30)
    ask(engine, generate("before", SHARED[:50]))
    crowd = ask(engine, generate("a", REPEATING, 20), score, pool)
    found = [event for event in crowd if isinstance(event, ScoreEvent | PoolEvent)]
    expected = [ask(native_engine(prefix_cache=False), request)[0] for request in (score, pool)]
    assert sorted(found, key=lambda event: event.request_id) == sorted(expected, key=lambda event: event.request_id)
