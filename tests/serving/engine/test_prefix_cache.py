"""Requests that begin alike compute their beginning once, and nothing else changes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from serving.engine.engine import Engine
from serving.engine.prefix_keys import block_key, root_key
from serving.engine.prepare import PreparedModel, prepare
from serving.engine.requests import (
    CancelRequest,
    EngineEvent,
    GenerateRequest,
    PoolEvent,
    PoolRequest,
    ScoreEvent,
    ScoreRequest,
    TokenEvent,
)
from tests.serving.engine.engines import alone, engine_of, generate, reused, run, tokens
from tests.serving.engine.tiny import make_decoder, prompt_of

pytestmark = pytest.mark.unit

SHARED = prompt_of(100, seed=9)
MODULE = "model.layers.1.self_attn.v_proj"


def ask(engine: Engine, *requests: GenerateRequest | ScoreRequest | PoolRequest) -> list[EngineEvent]:
    for request in requests:
        engine.submit(request)
    return run(engine)


def num_computed(engine: Engine) -> int:
    """Prompt tokens that went through the model."""
    return engine.stats().num_prompt_tokens


def all_blocks_come_back(engine: Engine) -> bool:
    stats = engine.stats()
    return stats.num_free_blocks == stats.num_total_blocks


@pytest.mark.parametrize(
    ("num_prompt", "num_found"), [(15, 0), (16, 0), (17, 16), (32, 16), (33, 32), (100, 96)], ids=str
)
def test_a_prompt_that_was_computed_is_not_computed_again_but_for_its_last_token(
    num_prompt: int, num_found: int
) -> None:
    engine, prompt = engine_of(), SHARED[:num_prompt]
    first = ask(engine, generate("a", prompt, 3))
    again = ask(engine, generate("a", prompt, 3))
    assert (reused(first, "a"), reused(again, "a")) == (0, num_found)
    assert num_computed(engine) == 2 * num_prompt - num_found
    assert tokens(again, "a") == tokens(first, "a") == alone(generate("a", prompt, 3))[0]
    assert {event.num_reused_tokens for event in again if isinstance(event, TokenEvent)} == {num_found}
    assert engine.stats().num_reused_tokens == num_found


def test_the_next_turn_of_a_conversation_finds_the_answer_too() -> None:
    engine, prompt = engine_of(), SHARED[:40]
    answer = tokens(ask(engine, generate("a", prompt, 30)), "a")
    second = generate("b", [*prompt, *answer, *prompt_of(20, seed=4)])
    events = ask(engine, second)
    assert reused(events, "b") == 64  # of the 70 tokens; the last one was sampled and never run
    assert tokens(events, "b") == alone(second)[0]


@pytest.mark.parametrize("seed", range(6))
def test_with_and_without_the_cache_every_token_is_the_same_on_the_plain_path(seed: int) -> None:
    """Conversations that branch, n choices, arrivals in the middle, small chunks, a cache so small that all fight."""
    rng = random.Random(seed)
    engine = engine_of(num_blocks=rng.choice([14, 20, 64]), max_step_tokens=rng.choice([5, 16, 40, 256]))
    known = [SHARED[:20], SHARED[:50], SHARED[:70]]
    asked: list[GenerateRequest] = []
    events: list[EngineEvent] = []
    for number in range(14):
        beginning = rng.choice(known)
        prompt = (beginning + prompt_of(rng.randrange(1, 30), seed=rng.randrange(3)))[: rng.randrange(1, 130)]
        request = generate(
            f"r{number}",
            prompt,
            rng.randrange(1, 25),
            num_choices=rng.choice([1, 1, 3]),
            temperature=rng.choice([0, 1]),
        )
        asked.append(request)
        engine.submit(request)
        for _ in range(rng.randrange(6)):
            events += engine.step().events
        known.append(prompt)
        known.append(prompt + tokens(events, request.request_id))
    events += run(engine)
    for request in asked:
        found = [tokens(events, request.request_id, index) for index in range(request.num_choices)]
        assert found == alone(request)
    assert engine.stats().num_reused_tokens > 0
    assert all_blocks_come_back(engine)


def fast_model() -> PreparedModel:
    return prepare(make_decoder(), exact=False)


def logprobs(events: list[EngineEvent], request_id: str) -> list[float]:
    return [
        item.logprob
        for event in events
        if isinstance(event, TokenEvent) and event.request_id == request_id
        for item in event.logprobs or ()
    ]


def test_on_the_fast_path_equal_chunks_give_equal_bits() -> None:
    """What was found ends where a chunk would have ended: the same products run, to the last bit."""
    first = generate("a", SHARED[:64] + prompt_of(5, seed=1), 2)
    second = generate("b", SHARED[:64] + prompt_of(30, seed=2), 20, temperature=1, num_top_logprobs=0)
    cached = engine_of(model=fast_model(), max_step_tokens=32)
    ask(cached, first)
    found = ask(cached, second)
    uncached = engine_of(model=fast_model(), max_step_tokens=32, prefix_cache=False)
    expected = ask(uncached, second)
    assert reused(found, "b") == 64
    assert tokens(found, "b") == tokens(expected, "b")
    assert logprobs(found, "b") == logprobs(expected, "b")


def test_choices_of_one_request_share_their_prompts_blocks() -> None:
    engine, request = engine_of(), generate("a", SHARED[:70], 20, num_choices=5, temperature=1)
    events = ask(engine, request)
    assert [tokens(events, "a", index) for index in range(5)] == alone(request)
    assert num_computed(engine) == 70 + 4 * (70 - 64)
    assert [reused(events, "a", index) for index in range(5)] == [0, 64, 64, 64, 64]


def test_requests_that_come_at_once_wait_for_the_one_that_computes_their_beginning() -> None:
    engine = engine_of(max_step_tokens=32)
    requests = [generate(f"r{i}", SHARED[:80] + prompt_of(3 + i, seed=i), 5) for i in range(4)]
    stranger = generate("other", prompt_of(10, seed=77), 5)
    for request in (*requests, stranger):
        engine.submit(request)
    engine.step()
    # The stranger waits for nothing of theirs, but the first chunk took the whole step.
    assert engine.stats().num_running == 1
    events = run(engine)
    assert num_computed(engine) == 80 + sum(3 + i for i in range(4)) + 10
    for request in (*requests, stranger):
        assert tokens(events, request.request_id) == alone(request)[0]


def test_choices_that_wait_for_their_prompt_are_not_taken_for_a_full_cache() -> None:
    """The gateway refuses new requests where something waits for room."""
    engine = engine_of()
    engine.submit(generate("a", SHARED[:40], num_choices=4))
    first, second = engine.step().stats, engine.step().stats
    assert (first.num_running, first.num_waiting, first.num_awaiting_turn) == (1, 3, 3)
    assert (second.num_running, second.num_waiting, second.num_awaiting_turn) == (3, 1, 1)  # the step is full
    run(engine)
    assert engine.stats().num_preemptions == 0


def test_who_waits_for_a_beginning_does_not_hold_up_others() -> None:
    engine = engine_of(max_step_tokens=96)
    for request in (generate("a", SHARED[:80]), generate("b", SHARED[:80]), generate("other", prompt_of(10, seed=5))):
        engine.submit(request)
    first = engine.step().events
    assert tokens(first, "other")
    assert not tokens(first, "b")


def test_a_beginning_is_shared_while_the_one_that_computed_it_still_runs() -> None:
    engine = engine_of(num_blocks=64)
    engine.submit(generate("a", SHARED[:96], 40))
    engine.step()
    engine.submit(generate("b", SHARED[:90], 40))
    engine.step()
    stats = engine.stats()
    # 96 tokens and what follows are 7 blocks; b takes 5 of them and 1 of its own.
    assert stats.num_total_blocks - stats.num_free_blocks == 7 + 1
    assert stats.num_idle_blocks == 0


def test_another_salt_finds_nothing() -> None:
    engine = engine_of()
    ask(engine, generate("a", SHARED, salt="one"))
    assert reused(ask(engine, generate("b", SHARED, salt="other")), "b") == 0
    assert reused(ask(engine, generate("c", SHARED)), "c") == 0
    assert reused(ask(engine, generate("d", SHARED, salt="one")), "d") == 96


def test_keys_tell_apart_whatever_changes_keys_and_values() -> None:
    ids = prompt_of(16)
    roots = [root_key(0, None, ""), root_key(1, None, ""), root_key(0, None, "x")]
    keys = {block_key(root, ids) for root in roots}
    keys |= {block_key(block_key(roots[0], ids), ids), block_key(roots[0], ids[::-1])}
    assert len(keys) == 5
    assert block_key(roots[0], list(ids)) == block_key(root_key(0, None, ""), ids)


def adapter_of(scale: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(size, generator=generator) for size in ((4, 32), (16, 4)))
    return {f"{MODULE}.lora_A.weight": a, f"{MODULE}.lora_B.weight": b * scale}


def test_adapters_and_their_versions_do_not_share() -> None:
    def adapted_alone(scale: float) -> list[int]:
        engine = engine_of(prefix_cache=False)
        engine.set_adapter("policy", adapter_of(scale), 1)
        return tokens(ask(engine, request), "a")

    engine, request = engine_of(), generate("a", SHARED, adapter="policy")
    engine.set_adapter("policy", adapter_of(1.0), 1)
    engine.set_adapter("other", adapter_of(1.0), 1)
    ask(engine, generate("base", SHARED), request)
    assert reused(ask(engine, generate("b", SHARED, adapter="other")), "b") == 0
    engine.set_adapter("policy", adapter_of(-2.0), 2)
    events = ask(engine, request)
    assert reused(events, "a") == 0
    assert tokens(events, "a") == adapted_alone(-2.0) != adapted_alone(1.0)
    assert reused(ask(engine, request), "a") == 96


def test_a_request_offers_blocks_of_the_adapter_version_it_came_with() -> None:
    engine = engine_of(max_step_tokens=32)
    engine.set_adapter("policy", adapter_of(1.0), 1)
    engine.submit(generate("old", SHARED, adapter="policy"))
    engine.step()
    engine.set_adapter("policy", adapter_of(-2.0), 2)
    engine.submit(generate("new", SHARED, adapter="policy"))
    assert reused(run(engine), "new") == 0


def test_a_replaced_model_finds_nothing_of_the_old_one() -> None:
    trained = make_decoder()
    with torch.no_grad():
        for layer in trained.iterate_layers():
            layer.mlp.down_proj.weight.mul_(-2)  # type: ignore[union-attr, operator]
    engine, request = engine_of(), generate("a", SHARED)
    before = tokens(ask(engine, request), "a")
    engine.replace_model(prepare(trained, exact=True))
    assert engine.stats().num_idle_blocks == 0
    events = ask(engine, request)
    assert reused(events, "a") == 0
    fresh = engine_of(model=prepare(trained, exact=True))
    assert tokens(events, "a") == tokens(ask(fresh, request), "a") != before
    assert reused(ask(engine, request), "a") == 96


def test_a_score_computes_every_position_and_leaves_its_blocks_to_others() -> None:
    engine, request = engine_of(), ScoreRequest(request_id="s", ids=SHARED)
    ask(engine, generate("a", SHARED))
    (found,) = ask(engine, request)
    (expected,) = ask(engine_of(prefix_cache=False), request)
    assert isinstance(found, ScoreEvent)
    assert isinstance(expected, ScoreEvent)
    assert found == expected
    other = engine_of()
    ask(other, request)
    assert reused(ask(other, generate("a", SHARED)), "a") == 96


def test_a_preempted_score_goes_on_where_it_was() -> None:
    ids = prompt_of(60, seed=3)
    engine = engine_of(num_blocks=7, max_step_tokens=2)
    engine.submit(generate("older", prompt_of(20), max_tokens=80))
    for _ in range(12):
        engine.step()
    engine.submit(ScoreRequest(request_id="s", ids=ids))
    (found,) = [event for event in run(engine) if isinstance(event, ScoreEvent)]
    assert engine.stats().num_preemptions > 0
    (expected,) = ask(engine_of(prefix_cache=False), ScoreRequest(request_id="s", ids=ids))
    assert isinstance(expected, ScoreEvent)
    assert [p.logprob for p in found.logprobs] == pytest.approx([p.logprob for p in expected.logprobs], abs=1e-4)
    assert num_computed(engine) < 20 + 2 * 60


def test_a_pool_request_finds_its_beginning_and_gives_the_same_values() -> None:
    engine, request = engine_of(), PoolRequest(request_id="p", ids=SHARED)
    ask(engine, generate("a", SHARED))
    num_before = num_computed(engine)
    (found,) = ask(engine, request)
    (expected,) = ask(engine_of(prefix_cache=False), request)
    assert isinstance(found, PoolEvent)
    assert isinstance(expected, PoolEvent)
    assert found.values == pytest.approx(expected.values, abs=1e-4)
    assert num_computed(engine) == num_before + 4
    assert engine.stats().num_reused_tokens == 96


def test_switched_off_nothing_is_kept() -> None:
    engine = engine_of(prefix_cache=False)
    ask(engine, generate("a", SHARED))
    assert engine.stats().num_idle_blocks == 0
    assert reused(ask(engine, generate("a", SHARED)), "a") == 0


def test_what_was_cancelled_in_the_middle_of_its_prompt_leaves_what_it_computed() -> None:
    engine = engine_of(max_step_tokens=40)
    engine.submit(generate("a", SHARED))
    engine.step()
    engine.cancel(CancelRequest(request_id="a"))
    run(engine)
    assert all_blocks_come_back(engine)
    again = ask(engine, generate("b", SHARED))
    assert reused(again, "b") == 32
    assert tokens(again, "b") == alone(generate("b", SHARED))[0]


def test_the_beginning_that_was_not_used_for_longest_makes_room_from_its_end() -> None:
    engine = engine_of(num_blocks=12)
    old, new = prompt_of(65, seed=1), prompt_of(65, seed=2)
    for number, prompt in enumerate((old, new, old, new)):  # new is the last one used
        ask(engine, generate(f"r{number}", prompt, 1))
    assert engine.stats().num_idle_blocks == 8
    ask(engine, generate("big", prompt_of(90, seed=3), 1))  # 6 blocks where 4 are free
    assert reused(ask(engine, generate("new", new, 1)), "new") == 64
    assert reused(ask(engine, generate("old", old, 1)), "old") == 32


def test_the_grouped_attention_reads_shared_blocks() -> None:
    """One batch in float32, so that tokens can be compared: several rows read the same blocks at once."""
    model = replace(prepare(make_decoder(), exact=True), is_exact=False)
    engine = engine_of(model=model)
    requests = [generate(f"r{i}", SHARED[:70] + prompt_of(2 + i, seed=i), 20, temperature=i % 2) for i in range(5)]
    events = ask(engine, *requests)
    for request in requests:
        assert tokens(events, request.request_id) == alone(request)[0]
    assert engine.stats().num_reused_tokens == 4 * 64
