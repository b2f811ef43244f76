"""Many more streams than the cache holds, long prompts beside short ones, and hours of small requests.

Time is counted in engine steps, memory in objects, so that a slow machine changes nothing.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest
import torch

from serving.engine.adapters import Adapter
from serving.engine.client import EngineClient, EventStream
from serving.engine.detokenizer import Detokenizer
from serving.engine.engine import Engine
from serving.engine.kv_blocks import blocks_for
from serving.engine.prepare import PreparedModel, prepare_live
from serving.engine.requests import (
    CancelRequest,
    EngineEvent,
    EngineRequest,
    GenerateRequest,
    PoolEvent,
    PoolRequest,
    SamplingParams,
    ScoreEvent,
    ScoreRequest,
    TokenEvent,
)
from serving.engine.sequence import Sequence as EngineSequence
from serving.model.tokenizer import ModelTokenizer
from tests.serving.engine.engines import alone, engine_of, generate, run, tokens
from tests.serving.engine.test_client import generate as scripted_request
from tests.serving.engine.test_client import running, settings
from tests.serving.engine.tiny import EOS, SPEC, make_decoder, prompt_of

pytestmark = pytest.mark.unit


class StepLog:
    """In which steps each request got a token."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.steps_of: dict[str, list[int]] = {}

    def __call__(self, events: list[EngineEvent]) -> None:
        for event in events:
            if isinstance(event, TokenEvent) and event.token_ids:
                self.steps_of.setdefault(event.request_id, []).append(self.num_steps)
        self.num_steps += 1

    def longest_gap(self, request_id: str) -> int:
        steps = self.steps_of[request_id]
        return max(after - before for before, after in pairwise(steps))


@pytest.mark.parametrize("prefix_cache", [True, False], ids=["cached", "uncached"])
def test_sixty_four_streams_on_a_cache_for_eight_all_end_as_they_would_alone(*, prefix_cache: bool) -> None:
    num_new, num_at_once = 24, 8
    num_blocks = num_at_once * blocks_for(24 + num_new)
    engine = engine_of(num_blocks, prefix_cache=prefix_cache)
    shared = prompt_of(16, seed=99)
    requests = [
        generate(f"r{i}", (shared if i % 3 == 0 else []) + prompt_of(4 + i % 5, seed=i), num_new, temperature=i % 2)
        for i in range(64)
    ]
    for request in requests:
        engine.submit(request)
    log = StepLog()
    events = run(engine, log)
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_free_blocks == num_blocks
    for number, request in enumerate(requests):
        assert [tokens(events, request.request_id)] == alone(request)
        # Eight at a time, in the order of arrival; twice that allows for what preemption computes again.
        assert log.steps_of[request.request_id][-1] <= 2 * (number // num_at_once + 1) * num_new


def test_who_came_first_is_never_overtaken_for_good_by_those_who_keep_coming() -> None:
    """A prompt that needs nearly the whole cache, and small ones that would always fit before it."""
    engine = engine_of(num_blocks=10, max_step_tokens=32)
    for number in range(6):
        engine.submit(generate(f"early{number}", prompt_of(10, seed=number), 20))
    engine.step()
    engine.submit(generate("long", prompt_of(120, seed=50), 20))
    log = StepLog()
    for number in range(120):
        engine.submit(generate(f"late{number}", prompt_of(10, seed=100 + number), 20))
        log(engine.step().events)
    # The early ones do not fit at once: 20 steps twice; then 4 for its prompt and 20 for its answer.
    assert log.steps_of["long"][-1] <= 2 * 20 + 4 + 20
    assert engine.stats().num_preemptions > 0


def test_who_waits_for_a_shared_beginning_gets_it_beside_others_who_keep_coming() -> None:
    engine = engine_of(num_blocks=64, max_step_tokens=16)
    engine.submit(generate("first", prompt_of(100, seed=1), 5))
    engine.submit(generate("same", prompt_of(100, seed=1), 5))
    log = StepLog()
    for number in range(30):
        engine.submit(generate(f"other{number}", prompt_of(8, seed=10 + number), 5))
        log(engine.step().events)
    assert log.steps_of["same"][0] <= 100 // 8 + 2


@pytest.mark.parametrize("num_long", [1, 3])
def test_between_two_tokens_of_a_stream_there_is_one_step_whatever_prompts_come(num_long: int) -> None:
    engine = engine_of(num_blocks=128, max_step_tokens=24)
    streams = [f"s{i}" for i in range(6)]
    for number, name in enumerate(streams):
        engine.submit(generate(name, prompt_of(4, seed=number), 60))
    log = StepLog()
    log(engine.step().events)
    for number in range(num_long):
        engine.submit(generate(f"long{number}", prompt_of(200, seed=80 + number), 5))
    while engine.has_work:
        before = engine.stats()
        log(engine.step().events)
        after = engine.stats()
        num_prefilled = after.num_prompt_tokens - before.num_prompt_tokens
        assert num_prefilled <= 24
    assert [log.longest_gap(name) for name in streams] == [1] * 6
    assert all(f"long{number}" in log.steps_of for number in range(num_long))


@pytest.mark.parametrize("prefix_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("num_streams", [1, 8])
def test_a_long_prompt_beside_streams_ends_in_bounded_steps_and_changes_nobody(
    num_streams: int, *, prefix_cache: bool
) -> None:
    """One token a step is the least that it gets; what comes after it has its turn, too."""
    engine = engine_of(num_blocks=256, prefix_cache=prefix_cache)
    requests = [generate(f"s{i}", prompt_of(4, seed=i), 230, temperature=i % 2) for i in range(num_streams)]
    for request in requests:
        engine.submit(request)
    engine.step()
    engine.step()
    requests += [generate("long", prompt_of(200, seed=80), 5), generate("after", prompt_of(20, seed=81), 5)]
    for request in requests[-2:]:
        engine.submit(request)
    log = StepLog()
    events = run(engine, log)
    assert 1 < log.steps_of["long"][0] < 200
    assert log.steps_of["after"][0] <= log.steps_of["long"][0] + 20
    assert [log.longest_gap(f"s{i}") for i in range(num_streams)] == [1] * num_streams
    for request in requests[-2:]:
        assert [tokens(events, request.request_id)] == alone(request)
    assert engine.stats().num_free_blocks == engine.stats().num_total_blocks


@dataclass
class _Bytes:
    """What the engine reads of a tokenizer."""

    token_bytes: Sequence[bytes] = tuple(bytes([32 + i]) for i in range(SPEC.vocab_size))
    eos_ids: frozenset[int] = frozenset({EOS})
    strips_leading_space: bool = True


ONE_LAYER = replace(SPEC, num_layers=1)


def small_model() -> PreparedModel:
    return prepare_live(make_decoder(ONE_LAYER), torch.float32)


def random_request(rng: random.Random, number: int) -> EngineRequest:
    ids = prompt_of(48, seed=rng.randrange(4))[: rng.randrange(1, 48)]
    name, salt, adapter = f"r{number}", rng.choice(["", "x"]), rng.choice([None, None, "policy"])
    kind = rng.random()
    if kind < 0.1:
        return ScoreRequest(request_id=name, ids=ids, cache_salt=salt, adapter=adapter)
    if kind < 0.2:
        return PoolRequest(request_id=name, ids=ids, cache_salt=salt, adapter=adapter)
    sampling = SamplingParams(
        max_tokens=rng.choice([1, 2, 4, 40]), temperature=1.0, seed=number, stop=rng.choice([(), ("ab", "c")])
    )
    return GenerateRequest(
        request_id=name,
        prompt_ids=ids,
        sampling=sampling,
        num_choices=rng.choice([1, 1, 2]),
        cache_salt=salt,
        adapter=adapter,
    )


def churn(engine: Engine, rng: random.Random, first: int, count: int) -> Counter[str]:
    """`count` requests, some of them cancelled at any time. How many terminal records each request got."""
    ended: Counter[str] = Counter()
    number = first
    while number < first + count or engine.has_work:
        while number < first + count and engine.stats().num_waiting < 8:
            engine.submit(random_request(rng, number))
            if rng.random() < 0.2:
                engine.cancel(CancelRequest(request_id=f"r{number - rng.randrange(6)}"))
            number += 1
        for event in engine.step().events:
            if isinstance(event, (ScoreEvent, PoolEvent)) or (isinstance(event, TokenEvent) and event.finish_reason):
                ended[event.request_id] += 1
    return ended


def num_alive(*kinds: type) -> dict[str, int]:
    gc.collect()
    alive = Counter(type(item) for item in gc.get_objects())
    return {kind.__name__: alive[kind] for kind in kinds}


def num_objects() -> int:
    gc.collect()
    return len(gc.get_objects())


def small_adapter() -> dict[str, torch.Tensor]:
    name = "model.layers.0.self_attn.v_proj"
    return {f"{name}.lora_A.weight": torch.randn(2, 32), f"{name}.lora_B.weight": torch.randn(16, 2)}


def num_open_files() -> int:
    """Linux: descriptors of this process; elsewhere there is no such folder, and nothing is compared."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_thousands_of_small_requests_leave_nothing_behind() -> None:
    engine, rng = engine_of(num_blocks=14, model=small_model()), random.Random(5)
    engine._tokenizer = cast("ModelTokenizer", _Bytes())
    engine.set_adapter("policy", small_adapter(), 1)
    kinds = (EngineSequence, Detokenizer, Adapter)
    churn(engine, rng, 0, 300)  # what is made once, is made
    before, objects_before, files_before = num_alive(*kinds), num_objects(), num_open_files()
    ended: Counter[str] = Counter()
    for turn in range(4):
        engine.set_adapter("policy", small_adapter(), 2 + turn)
        ended += churn(engine, rng, 1000 * (turn + 1), 600)
    assert len(ended) == 2400
    assert set(ended.values()) == {1, 2}
    del ended
    assert num_alive(*kinds) == before
    assert num_objects() <= objects_before + 20
    assert num_open_files() == files_before
    stats, allocator = engine.stats(), engine._scheduler.allocator
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_blocks == stats.num_total_blocks
    assert stats.num_idle_blocks > 0
    assert stats.num_preemptions > 0
    assert len(allocator._block_of_key) == len(allocator._key_of_block) == stats.num_idle_blocks
    assert not allocator._num_holders
    assert not engine._sequences


async def use(client: EngineClient, rng: random.Random, number: int) -> None:
    """One caller: reads to the end, leaves in the middle, or has it cancelled."""
    stream = client.submit(scripted_request(f"r{number}", max_tokens=rng.randrange(1, 4), num_choices=2))
    way = rng.random()
    if way < 0.3:
        await anext(stream)
        await stream.aclose()
    elif way < 0.5:
        await client.cancel(f"r{number}")
    elif way < 0.6:
        await stream.aclose()
    async for _ in stream:
        pass


async def test_thousands_of_callers_leave_nothing_behind_in_the_client() -> None:
    rng = random.Random(6)
    async with running(EngineClient(settings())) as client:

        async def use_many(first: int, count: int) -> None:
            for start in range(first, first + count, 50):
                await asyncio.gather(*(use(client, rng, number) for number in range(start, start + 50)))
            while client.seconds_since_progress() is not None:
                await asyncio.sleep(0.001)

        await use_many(0, 200)
        before, objects_before = num_alive(EventStream, asyncio.Future, asyncio.Task), num_objects()
        files_before = num_open_files()
        await use_many(200, 2000)
        assert not client._streams
        assert not client._cancelled_at
        assert num_alive(EventStream, asyncio.Future, asyncio.Task) == before
        assert num_objects() <= objects_before + 50
        assert num_open_files() == files_before
        assert client.stats is not None
        assert client.stats.num_running == 0


def test_a_preempted_stream_does_not_lose_or_repeat_text() -> None:
    engine = engine_of(num_blocks=8)
    engine._tokenizer = cast("ModelTokenizer", _Bytes())
    requests = [generate(f"r{i}", prompt_of(20, seed=i), 40, temperature=1) for i in range(5)]
    for request in requests:
        engine.submit(request)
    events = run(engine)
    assert engine.stats().num_preemptions > 0
    for request in requests:
        text = "".join(e.text for e in events if isinstance(e, TokenEvent) and e.request_id == request.request_id)
        ids = tokens(events, request.request_id)
        assert text == b"".join(_Bytes.token_bytes[i] for i in ids).decode().removeprefix(" ")
        assert [ids] == alone(request)
