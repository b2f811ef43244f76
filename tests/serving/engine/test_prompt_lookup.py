"""Guessing what comes next saves steps and changes no token, whether it is drawn or the most likely one."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
from msgspec.structs import replace

from serving.engine.prepare import prepare_live
from serving.engine.prompt_lookup import MAX_GUESS, PromptLookup
from serving.engine.requests import EngineEvent, TokenEvent
from serving.engine.sampler import uniform_draw
from tests.serving.engine.engines import alone, engine_of, generate, run, tokens, with_guesses
from tests.serving.engine.tiny import make_decoder, prompt_of

pytestmark = pytest.mark.unit

REPEATING = prompt_of(12, seed=3) * 4


def final(events: list[EngineEvent]) -> TokenEvent:
    last = events[-1]
    assert isinstance(last, TokenEvent)
    return last


def test_the_guess_is_what_followed_the_longest_of_the_last_words_the_last_time() -> None:
    lookup = PromptLookup()
    ids = [1, 2, 3, 10, 11, 9, 2, 3, 20, 21, 1, 2, 3]
    assert lookup.guess(ids, 2) == [10, 11]
    ids += [10, 5, 2, 3]
    assert lookup.guess(ids, 4) == [10, 5, 2, 3]
    assert lookup.guess(ids, 0) == []
    assert lookup.guess([*ids, 50], 4) == []


def test_a_sequence_whose_guesses_are_wrong_makes_no_more() -> None:
    lookup, ids = PromptLookup(), [1, 2, 3] * 5
    for _ in range(8):
        assert lookup.guess(ids, 4)
        lookup.learn(4, 1)
    assert lookup.guess(ids, 4) == []
    paying = PromptLookup()
    paying.learn(100, 50)
    assert paying.guess(ids, 4)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 0.4},
        {"temperature": 0.4, "top_p": 0.9, "presence_penalty": -0.4, "frequency_penalty": 0.01},
    ],
    ids=["greedy", "drawn", "penalised"],
)
def test_every_token_is_the_one_without_guesses_on_the_plain_path(sampling: dict[str, float]) -> None:
    request = generate("a", REPEATING, 60, num_choices=2)
    request = replace(request, sampling=replace(request.sampling, **sampling))
    engine = engine_of(prompt_lookup=True)
    engine.submit(request)
    events = run(engine)
    stats = engine.stats()
    assert [tokens(events, "a", index) for index in range(2)] == alone(request)
    assert 0 < stats.num_guessed_right < stats.num_guessed_tokens
    assert stats.num_free_blocks == stats.num_total_blocks


def test_right_guesses_save_steps() -> None:
    request = generate("a", REPEATING, 60)
    with_lookup, without = engine_of(prompt_lookup=True), engine_of()
    for engine in (with_lookup, without):
        engine.submit(request)
        run(engine)
    num_right = with_lookup.stats().num_guessed_right
    assert num_right > 10
    # The last token may be a guessed one, with none drawn after it.
    assert without.stats().num_steps - with_lookup.stats().num_steps in (num_right - 1, num_right)


@pytest.mark.parametrize("num_right", range(MAX_GUESS + 1))
def test_what_follows_a_wrong_guess_does_not_see_it(num_right: int) -> None:
    """Guesses that are right so far and then wrong: the rest of the answer is what it would have been."""
    request = generate("a", prompt_of(20), 30, num_top_logprobs=2)
    (expected,) = alone(request)
    guess = [*expected[1 : 1 + num_right], *[(token + 1) % 97 for token in expected[1 + num_right : 5]]]
    engine = engine_of()
    with_guesses(engine, request, guess)
    events = run(engine)
    assert tokens(events, "a") == expected
    second = events[1]
    assert isinstance(second, TokenEvent)
    assert second.token_ids == expected[1 : 2 + num_right]
    assert second.logprobs is not None
    assert [found.token_id for found in second.logprobs] == second.token_ids


@pytest.mark.parametrize("max_tokens", range(1, 8))
def test_an_answer_ends_in_the_middle_of_a_right_guess_where_it_would_have(max_tokens: int) -> None:
    request = generate("a", prompt_of(20), max_tokens)
    (expected,) = alone(replace(request, sampling=generate("a", [2], 20).sampling))
    engine = engine_of()
    with_guesses(engine, request, expected[1:5])
    events = run(engine)
    assert tokens(events, "a") == expected[:max_tokens]
    assert final(events).finish_reason == "length"


def test_an_end_of_turn_in_a_right_guess_ends_the_answer() -> None:
    request = generate("a", prompt_of(20), 20)
    (expected,) = alone(request)
    engine = engine_of()
    engine._eos_ids = frozenset({expected[3]})
    sampling = replace(request.sampling, ignore_eos=False)
    with_guesses(engine, replace(request, sampling=sampling), expected[1:5])
    events = run(engine)
    assert tokens(events, "a") == expected[: expected.index(expected[3]) + 1]
    assert final(events).finish_reason == "stop"
    # The next turn finds only what was said.
    again = generate("b", [*request.prompt_ids, *expected[:4], *prompt_of(30, seed=8)])
    engine.submit(again)
    assert tokens(run(engine), "b") == alone(again)[0]


@pytest.mark.parametrize("num_blocks", [9, 64], ids=["preempted", "roomy"])
def test_guesses_beside_each_other_in_little_memory_change_nothing(num_blocks: int) -> None:
    requests = [generate(f"r{i}", prompt_of(5 + i, seed=i) * 3, 50, temperature=0.3 * (i % 2)) for i in range(4)]
    engine = engine_of(num_blocks, prompt_lookup=True, max_step_tokens=24)
    for request in requests:
        engine.submit(request)
    events = run(engine)
    assert engine.stats().num_guessed_right > 0
    assert (engine.stats().num_preemptions > 0) == (num_blocks == 9)
    for request in requests:
        assert [tokens(events, request.request_id)] == alone(request)


def test_a_guess_takes_no_more_than_the_step_has_left() -> None:
    engine = engine_of(prompt_lookup=True, max_step_tokens=8)
    for number in range(3):
        engine.submit(generate(f"r{number}", [number + 2, number + 20] * 6, 40))
    seen: list[int] = []
    while engine.has_work:
        num_before, num_running = engine.stats().num_guessed_tokens, engine.stats().num_running
        engine.step()
        seen.append(engine.stats().num_guessed_tokens - num_before + num_running)
    assert 3 < max(seen) <= 8


def test_the_distribution_of_drawn_text_is_the_models_whatever_is_guessed() -> None:
    """Three draws with two candidates each, the guess always the same: eight answers, as often as the model says."""
    prompt, num_drawn, temperature = prompt_of(9, seed=2), 1000, 1.5
    decoder = make_decoder()
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    with torch.no_grad():
        for _ in range(3):
            longer: dict[tuple[int, ...], float] = {}
            for said, probability in expected.items():
                values, ids = (decoder(torch.tensor([[*prompt, *said]]))[0, -1] / temperature).topk(2)
                for token_id, share in zip(ids.tolist(), values.softmax(-1).tolist(), strict=True):
                    longer[*said, token_id] = probability * share
            expected = longer
    guess = max(expected, key=lambda said: expected[said])[1:]
    engine = engine_of(num_blocks=512, model=prepare_live(decoder, torch.float32), max_running=4)
    drawn: Counter[tuple[int, ...]] = Counter()
    for first in range(0, num_drawn, 200):
        for number in range(first, first + 200):
            request = generate(f"r{number}", prompt, 3, temperature=temperature, top_k=2, seed=number)
            with_guesses(engine, request, guess)
        events = run(engine)
        drawn.update(tuple(tokens(events, f"r{number}")) for number in range(first, first + 200))
    assert set(drawn) <= set(expected)
    assert engine.stats().num_guessed_right > 100
    assert chi_square(drawn, expected) < 24.3  # 7 degrees of freedom: exceeded once in a thousand
    wrong = dict.fromkeys(expected, 1 / 8)
    assert chi_square(drawn, wrong) > 24.3


def chi_square(drawn: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    total = drawn.total()
    return sum((drawn[said] - total * share) ** 2 / (total * share) for said, share in expected.items())


def test_seeds_draw_evenly() -> None:
    """What the test above rests on."""
    draws = [uniform_draw(seed, 0, index) for seed, index in product(range(500), range(3))]
    assert abs(sum(draws) / len(draws) - 0.5) < 0.03
