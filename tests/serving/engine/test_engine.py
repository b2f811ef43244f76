"""The engine against the plain decoder, on tiny random models: batching, chunking and preemption change nothing."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
import torch

from quant.errors import CheckpointError
from serving.engine.engine import Engine, EngineLimits
from serving.engine.kv_blocks import KVLayout
from serving.engine.logits import serving_logits
from serving.engine.prepare import prepare, prepare_live
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
from serving.errors import InvalidRequest, PromptTooLong, QueueFull
from serving.model.spec import DecoderSpec
from tests.serving.engine.tiny import EOS, PALM_SPEC, SPEC, make_decoder, prompt_of

pytestmark = pytest.mark.unit


def make_engine(*, num_blocks: int = 64, exact: bool = True, **limits: int) -> Engine:
    model = prepare(make_decoder(), exact=exact)
    kv_bytes = num_blocks * KVLayout.of(SPEC, model.dtype).block_bytes
    return Engine(model, kv_bytes=kv_bytes, tokenizer=None, limits=EngineLimits(**limits), eos_ids=frozenset({EOS}))


def generate(request_id: str, prompt: list[int], max_tokens: int = 12, **changes: object) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0, seed=7, ignore_eos=True)
    num_choices = int(str(changes.pop("num_choices", 1)))
    sampling = msgspec.structs.replace(sampling, **changes)
    return GenerateRequest(request_id=request_id, prompt_ids=prompt, sampling=sampling, num_choices=num_choices)


def run(engine: Engine) -> list[EngineEvent]:
    events: list[EngineEvent] = []
    while engine.has_work:
        events += engine.step().events
    return events


def tokens(events: list[EngineEvent], request_id: str, choice_index: int = 0) -> list[int]:
    found: list[int] = []
    for event in events:
        if isinstance(event, TokenEvent) and (event.request_id, event.choice_index) == (request_id, choice_index):
            found += event.token_ids
    return found


def alone(request: EngineRequest, **limits: int) -> list[EngineEvent]:
    one = make_engine(num_blocks=64, exact=True, **limits)
    one.submit(request)
    return run(one)


def greedy_reference(prompt: list[int], count: int) -> list[int]:
    """The plain decoder over the whole sequence, once for every token."""
    decoder, ids = make_decoder(), list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(decoder(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_tokens_are_the_plain_decoders() -> None:
    prompt = prompt_of(21)
    assert tokens(alone(generate("a", prompt)), "a") == greedy_reference(prompt, 12)


def test_a_batch_gives_what_each_gives_alone() -> None:
    requests = [generate(f"r{i}", prompt_of(3 + 9 * i, seed=i), max_tokens=5 + i, temperature=i % 2) for i in range(6)]
    engine = make_engine(max_step_tokens=16)
    for request in requests:
        engine.submit(request)
    together = run(engine)
    for request in requests:
        assert tokens(together, request.request_id) == tokens(alone(request), request.request_id)


def test_sequences_attended_together_see_only_their_own_tokens() -> None:
    """The grouped attention of the fast path, in float32 so that tokens can be compared."""
    requests = [generate(f"r{i}", prompt_of(17 + 3 * i, seed=i), max_tokens=20) for i in range(5)]
    engine = make_engine()
    engine.model = replace(engine.model, is_exact=False)
    for request in requests:
        engine.submit(request)
    together = run(engine)
    for request in requests:
        assert tokens(together, request.request_id) == tokens(alone(request), request.request_id)


def test_chunked_prefill_changes_nothing() -> None:
    request = generate("a", prompt_of(70))
    assert tokens(alone(request, max_step_tokens=7), "a") == tokens(alone(request), "a")


def test_preempted_sequences_resume_with_identical_tokens() -> None:
    requests = [generate(f"r{i}", prompt_of(20, seed=i), max_tokens=40, temperature=0.9) for i in range(4)]
    engine = make_engine(num_blocks=10)
    for request in requests:
        engine.submit(request)
    events = run(engine)
    assert engine._scheduler.num_preemptions > 0
    for request in requests:
        assert tokens(events, request.request_id) == tokens(alone(request), request.request_id)
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_total_blocks


def test_the_fast_path_agrees_with_the_plain_one() -> None:
    """The distributions agree to bf16 rounding; a layer out of place moves them by whole units."""
    ids = prompt_of(60)
    exact = next(e for e in alone(ScoreRequest(request_id="s", ids=ids)) if isinstance(e, ScoreEvent))
    engine = make_engine(exact=False, max_step_tokens=25)
    engine.submit(ScoreRequest(request_id="s", ids=ids))
    fast = next(e for e in run(engine) if isinstance(e, ScoreEvent))
    for one, other in zip(exact.logprobs, fast.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=0.15)


def test_scores_are_the_decoders_logprobs_in_any_chunking() -> None:
    ids = prompt_of(40)
    with torch.no_grad():
        logprobs = make_decoder()(torch.tensor([ids]))[0].log_softmax(-1)
    expected = [float(logprobs[i, ids[i + 1]]) for i in range(len(ids) - 1)]
    for chunk in (256, 9):
        (event,) = alone(ScoreRequest(request_id="s", ids=ids, num_top_logprobs=3), max_step_tokens=chunk)
        assert isinstance(event, ScoreEvent)
        assert [found.logprob for found in event.logprobs] == pytest.approx(expected, abs=1e-4)
        assert all(len(found.top) == 3 for found in event.logprobs)


def test_a_preempted_score_request_scores_every_position_once() -> None:
    ids = prompt_of(60, seed=3)
    engine = make_engine(num_blocks=7, max_step_tokens=2)
    engine.submit(generate("older", prompt_of(20), max_tokens=80))
    for _ in range(12):
        engine.step()
    engine.submit(ScoreRequest(request_id="s", ids=ids))
    (found,) = [event for event in run(engine) if isinstance(event, ScoreEvent)]
    assert engine._scheduler.num_preemptions > 0
    (expected,) = alone(ScoreRequest(request_id="s", ids=ids))
    assert isinstance(expected, ScoreEvent)
    assert [p.token_id for p in found.logprobs] == ids[1:]
    assert [p.logprob for p in found.logprobs] == pytest.approx([p.logprob for p in expected.logprobs], abs=1e-4)


def test_pool_gives_the_last_hidden_state_through_a_head() -> None:
    ids, decoder = prompt_of(19), make_decoder()
    with torch.no_grad():
        cos, sin = decoder.rotary(torch.arange(len(ids)))
        hidden = decoder.embed(torch.tensor([ids]))
        for layer in decoder.layers:
            hidden = layer(hidden, cos, sin)
        expected = decoder.final_norm(hidden)[0, -1]
    engine = make_engine()
    head = torch.randn(2, SPEC.hidden_size)
    engine.set_head("reward", head)
    engine.submit(PoolRequest(request_id="h", ids=ids))
    engine.submit(PoolRequest(request_id="r", ids=ids, head="reward"))
    values = {event.request_id: event.values for event in run(engine) if isinstance(event, PoolEvent)}
    assert values["h"] == pytest.approx(expected.tolist(), abs=1e-4)
    assert values["r"] == pytest.approx((head @ expected).tolist(), abs=1e-3)


def test_an_adapter_changes_only_the_rows_that_name_it() -> None:
    ids, name = prompt_of(15), "model.layers.1.self_attn.v_proj"
    a, b = torch.randn(4, SPEC.hidden_size), torch.randn(SPEC.num_kv_heads * SPEC.head_dim, 4)
    engine = make_engine()
    engine.set_adapter("tuned", {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, version=1)
    engine.submit(ScoreRequest(request_id="base", ids=ids))
    engine.submit(ScoreRequest(request_id="tuned", ids=ids, adapter="tuned"))
    found = {e.request_id: [p.logprob for p in e.logprobs] for e in run(engine) if isinstance(e, ScoreEvent)}
    decoder = make_decoder()
    with torch.no_grad():
        for request_id in ("base", "tuned"):
            logprobs = decoder(torch.tensor([ids]))[0].log_softmax(-1)
            expected = [float(logprobs[i, ids[i + 1]]) for i in range(len(ids) - 1)]
            assert found[request_id] == pytest.approx(expected, abs=1e-3)
            decoder.get_submodule(name).weight.add_(b @ a)  # type: ignore[operator]


def adapter_of(scale: float, module: str = "model.layers.1.self_attn.v_proj") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(size, generator=generator) for size in ((4, 32), (16, 4)))
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b * scale}


def with_adapter(request: GenerateRequest) -> GenerateRequest:
    return msgspec.structs.replace(request, adapter="policy")


def adapted_alone(scale: float, request: GenerateRequest) -> list[int]:
    engine = make_engine()
    engine.set_adapter("policy", adapter_of(scale), 1)
    engine.submit(request)
    return tokens(run(engine), request.request_id)


def test_a_request_keeps_to_the_end_the_adapter_version_it_came_with() -> None:
    """Also when computed again after preemption, and in one batch with one that came after the new version."""
    old, younger, new = (
        with_adapter(generate(name, prompt_of(20, seed=i), max_tokens=40)) for i, name in enumerate("abc")
    )
    engine = make_engine(num_blocks=7)
    engine.model = replace(engine.model, is_exact=False)
    engine.set_adapter("policy", adapter_of(1.0), 1)
    engine.submit(old)
    engine.submit(younger)
    events = engine.step().events + engine.step().events
    engine.set_adapter("policy", adapter_of(-2.0), 2)
    engine.submit(new)
    events += run(engine)
    assert engine._scheduler.num_preemptions > 0
    assert tokens(events, "a") == adapted_alone(1.0, old) != adapted_alone(-2.0, old)
    assert tokens(events, "b") == adapted_alone(1.0, younger) != adapted_alone(-2.0, younger)
    assert tokens(events, "c") == adapted_alone(-2.0, new) != adapted_alone(1.0, new)


def test_training_an_adapter_on_after_it_was_set_changes_nothing_in_the_engine() -> None:
    tensors, request = adapter_of(1.0), with_adapter(generate("a", prompt_of(20)))
    engine = make_engine()
    engine.set_adapter("policy", tensors, 1)
    tensors["model.layers.1.self_attn.v_proj.lora_B.weight"].mul_(-3)
    engine.submit(request)
    assert tokens(run(engine), "a") == adapted_alone(1.0, request)


def test_an_adapter_that_does_not_fit_is_refused_by_name() -> None:
    engine = make_engine()
    with pytest.raises(CheckpointError, match=r"no linear 'base_model\.v_proj'; .* like 'model\.layers\.0\.self_attn"):
        engine.set_adapter("policy", adapter_of(1.0, "base_model.v_proj"), 1)
    with pytest.raises(CheckpointError, match=r"q_proj is \(16, 32\); the model's is \(32, 32\)"):
        engine.set_adapter("policy", adapter_of(1.0, "model.layers.0.self_attn.q_proj"), 1)
    engine.set_adapter("policy", adapter_of(1.0), 4)
    with pytest.raises(ValueError, match="at version 4; a new one must be higher, got 4"):
        engine.set_adapter("policy", adapter_of(2.0), 4)


def test_a_replaced_model_answers_as_if_it_had_been_the_first() -> None:
    request = generate("a", prompt_of(21), temperature=1.0)
    trained = make_decoder()
    with torch.no_grad():
        for layer in trained.iterate_layers():
            layer.mlp.down_proj.weight.mul_(-2)  # type: ignore[union-attr, operator]
    engine = make_engine()
    engine.submit(request)
    before = tokens(run(engine), "a")
    engine.replace_model(prepare(trained, exact=True))
    engine.submit(request)
    after = tokens(run(engine), "a")
    fresh = Engine(prepare(trained, exact=True), kv_bytes=1 << 20, tokenizer=None)
    fresh.submit(request)
    assert after == tokens(run(fresh), "a") != before


def test_a_model_is_not_replaced_under_a_running_request_nor_by_one_of_another_form() -> None:
    engine = make_engine()
    engine.submit(generate("a", prompt_of(5)))
    engine.step()
    with pytest.raises(RuntimeError, match="while requests are in progress"):
        engine.replace_model(engine.model)
    run(engine)
    with pytest.raises(ValueError, match="the new model is"):
        engine.replace_model(prepare(make_decoder(replace(SPEC, num_layers=2)), exact=True))
    with pytest.raises(ValueError, match=r"in torch\.bfloat16"):
        engine.replace_model(prepare(make_decoder(), exact=False))


@pytest.mark.parametrize("spec", [SPEC, PALM_SPEC], ids=["untied", "palm"])
def test_live_weights_are_copied_whole(spec: DecoderSpec) -> None:
    """An optimizer step after `prepare_live` must not reach a part of the weights that a roll-out reads."""
    decoder, ids = make_decoder(spec), torch.tensor(prompt_of(30))
    with torch.no_grad():
        expected = decoder(ids.unsqueeze(0))[0]
        live = prepare_live(decoder, torch.float32)
        for parameter in decoder.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(serving_logits(live, ids), expected, atol=1e-4, rtol=0)


def test_a_live_batch_draws_what_each_sequence_draws_alone() -> None:
    requests = [generate(f"r{i}", prompt_of(3 + 5 * i, seed=i), max_tokens=20, temperature=1.0) for i in range(8)]
    engine = Engine(prepare_live(make_decoder(), torch.float32), kv_bytes=1 << 20, tokenizer=None)
    for request in requests:
        engine.submit(request)
    together = run(engine)
    for request in requests:
        assert tokens(together, request.request_id) == tokens(alone(request), request.request_id)


def test_logprobs_can_be_those_of_the_temperature_that_is_sampled_at() -> None:
    prompt, temperature = prompt_of(6), 0.5
    request = generate("a", prompt, temperature=temperature, num_top_logprobs=0, logprob_temperature=temperature)
    events = alone(request)
    ids = prompt + tokens(events, "a")
    with torch.no_grad():
        expected = (make_decoder()(torch.tensor([ids]))[0] / temperature).log_softmax(-1)
    found = [item.logprob for event in events if isinstance(event, TokenEvent) for item in event.logprobs or ()]
    wanted = [float(expected[i - 1, ids[i]]) for i in range(len(prompt), len(ids))]
    assert found == pytest.approx(wanted, abs=1e-4)


def test_a_cancelled_sequence_frees_its_blocks_at_the_next_step_in_the_middle_of_prefill() -> None:
    engine = make_engine(max_step_tokens=8)
    engine.submit(generate("long", prompt_of(100)))
    engine.submit(generate("other", prompt_of(5)))
    engine.step()
    engine.cancel(CancelRequest(request_id="long"))
    report = engine.step()
    (terminal,) = [e for e in report.events if isinstance(e, TokenEvent) and e.request_id == "long"]
    assert terminal.finish_reason == "cancelled"
    assert report.stats.freed_request_ids == ["long"]
    assert len(tokens(report.events + run(engine), "other")) == 12


def test_one_choice_can_be_cancelled_alone() -> None:
    engine = make_engine()
    engine.submit(generate("a", prompt_of(5), num_choices=3, temperature=1.0))
    first = engine.step().events
    engine.cancel(CancelRequest(request_id="a", choice_index=1))
    events = first + run(engine)
    assert [len(tokens(events, "a", i)) for i in range(3)] == [12, 1, 12]


def test_every_choice_ends_in_exactly_one_terminal_event() -> None:
    engine = make_engine(max_running=3)
    for i in range(5):
        engine.submit(generate(f"r{i}", prompt_of(4, seed=i), num_choices=2, temperature=1.0, ignore_eos=False))
    ended = [(e.request_id, e.choice_index) for e in run(engine) if isinstance(e, TokenEvent) and e.finish_reason]
    assert sorted(ended) == [(f"r{i}", c) for i in range(5) for c in range(2)]


def test_a_long_prefill_does_not_stall_a_running_stream() -> None:
    engine = make_engine(max_step_tokens=16)
    engine.submit(generate("stream", prompt_of(4), max_tokens=30))
    engine.step()
    engine.submit(generate("long", prompt_of(150)))
    for _ in range(8):
        assert tokens(engine.step().events, "stream")


def test_generation_ends_at_the_end_of_the_context() -> None:
    events = alone(generate("a", prompt_of(250), max_tokens=100))
    assert len(tokens(events, "a")) == SPEC.max_positions - 250
    assert isinstance(events[-1], TokenEvent)
    assert events[-1].finish_reason == "length"


def test_what_can_never_fit_is_refused_with_both_numbers() -> None:
    engine = make_engine(num_blocks=4)
    with pytest.raises(PromptTooLong, match="prompt has 64 tokens; this server accepts 63"):
        engine.submit(generate("a", prompt_of(64)))
    engine.submit(ScoreRequest(request_id="s", ids=prompt_of(64)))
    assert len(run(engine)) == 1


def test_a_full_queue_is_refused() -> None:
    engine = make_engine(max_waiting=2)
    engine.submit(generate("a", [5], num_choices=2))
    with pytest.raises(QueueFull, match="limit is 2"):
        engine.submit(generate("b", [5]))


@pytest.mark.parametrize("ids", [[], [-1], [SPEC.vocab_size]])
def test_ids_outside_the_vocabulary_are_refused(ids: list[int]) -> None:
    with pytest.raises(InvalidRequest):
        make_engine().submit(generate("a", ids))


def test_logprobs_come_with_the_tokens_that_were_drawn() -> None:
    events = alone(generate("a", prompt_of(6), temperature=1.0, num_top_logprobs=2))
    for event in events:
        assert isinstance(event, TokenEvent)
        assert event.logprobs is not None
        assert [found.token_id for found in event.logprobs] == event.token_ids
        assert len(event.logprobs[0].top) == 2
