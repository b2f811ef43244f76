"""Moderation of what comes out: whatever the tokens and chunks, nothing of a flagged passage reaches a client.

"Nothing" is literal: no character of the passage or of what follows it, in text, log-probabilities or bytes.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moderation.categories import Category
from moderation.policy import Policy, PolicyOptions, Sensitivity, Verdict
from serving.engine.requests import EngineRequest, FinishReason, GenerateRequest, SamplingParams
from serving.gateway.app import build_app
from serving.gateway.choices import Answer
from serving.gateway.generation import Generations
from serving.gateway.judging import WITHHELD, Moderation
from serving.gateway.ports import ModerationMode, ModerationRules, OnFailure
from serving.gateway.request_context import RequestContext
from tests.moderation.fake_classifier import WordClassifier
from tests.serving.gateway.fakes import (
    EOS,
    ByteTokenizer,
    ListSink,
    ScriptedEngine,
    Step,
    WordPolicy,
    chat_body,
    client_for,
    client_of,
    make_model,
    make_rules,
    make_services,
    say,
    token,
)

pytestmark = pytest.mark.unit

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PASSAGE = "mix acid with the pipe bomb"
FINE = "It is a fine day, and we go for a walk in the old park by the sea. " * 3


def rules(output: ModerationMode = "block", **fields: object) -> ModerationRules:
    return make_rules(output=output, **fields)  # pyright: ignore[reportArgumentType]


class Received:
    """Everything that one choice's client got, from a stream or a joined answer, chat or completion."""

    def __init__(self) -> None:
        self.text = ""
        self.tokens: list[str] = []
        self.bytes = b""
        self.finish_reasons: list[str] = []
        self.refusal: str | None = None

    def add(self, choice: dict[str, object]) -> None:
        said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        assert isinstance(said, dict)
        self.text += str(said.get("content") or "")
        refusal = said.get("refusal")
        self.refusal = str(refusal) if refusal else self.refusal
        logprobs = choice.get("logprobs")
        if isinstance(logprobs, dict):
            entries = logprobs.get("content") or []
            self.tokens += [entry["token"] for entry in entries] or logprobs.get("tokens") or []
            self.bytes += bytes(byte for entry in entries for byte in entry["bytes"] or [])
        if choice["finish_reason"] is not None:
            self.finish_reasons.append(str(choice["finish_reason"]))


async def ask(
    engine: ScriptedEngine, path: str = CHAT, *, force: ModerationRules | None = None, **fields: object
) -> list[Received]:
    """The choices, whichever way they came. Asserts that a stream ends as streams do."""
    body = {**chat_body(), **fields} if path == CHAT else {"model": "tiny", "prompt": "Hi", **fields}
    async with client_for(engine, rules=force or rules()) as client:
        response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return collect(response.text)


def collect(body: str) -> list[Received]:
    *events, done = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert done == "[DONE]" if body.startswith("data:") else not events
    received: dict[int, Received] = {}
    for answer in events or [done]:
        for choice in json.loads(answer)["choices"]:
            received.setdefault(choice["index"], Received()).add(dict(choice))
    return [received[index] for index in sorted(received)]


def said_in(cuts: Sequence[int], text: str, finish: FinishReason = "stop") -> Callable[[EngineRequest], list[Step]]:
    """`text` as tokens of one byte each, cut into events anywhere, also inside a character."""
    encoded = text.encode()
    edges = [0, *sorted(cut % (len(encoded) + 1) for cut in cuts), len(encoded)]

    def script(request: EngineRequest) -> list[Step]:
        steps: list[Step] = []
        shown = 0
        for start, end in pairwise(edges):
            whole = len(encoded[:end].decode("utf-8", "ignore"))
            steps.append(token(request, text[shown:whole], ids=list(encoded[start:end])))
            shown = whole
        return [*steps, token(request, "", ids=[EOS], finish=finish)]

    return script


PROSE = st.text(alphabet="abc ,.é天\U0001f600", max_size=120)


@given(
    PROSE,
    PROSE,
    st.lists(st.integers(0, 1000), max_size=25),
    st.booleans(),
    st.booleans(),
    st.sampled_from([CHAT, COMPLETIONS]),
)
@example("", "", [], True, False, CHAT)
@example(FINE, FINE, list(range(500)), True, True, CHAT)
@example(FINE, FINE, list(range(0, 500, 3)), True, True, COMPLETIONS)
@example(FINE, FINE, [], False, False, COMPLETIONS)
@settings(max_examples=40, deadline=None)
async def test_nothing_of_a_flagged_passage_leaves_however_it_is_cut(
    before: str, after: str, cuts: list[int], is_streamed: bool, is_paced: bool, path: str
) -> None:
    text = before + PASSAGE + after
    engine = ScriptedEngine(said_in(cuts, text), is_paced=is_paced)

    (got,) = await ask(engine, path, stream=is_streamed, logprobs=True if path == CHAT else 1)

    assert got.finish_reasons == ["content_filter"]
    assert before.startswith(got.text)
    assert len(got.tokens) == len(got.text.encode())  # a token is a byte here
    if path == CHAT:
        assert got.bytes == got.text.encode()
        assert got.refusal == WITHHELD


@given(PROSE, st.lists(st.integers(0, 1000), max_size=25), st.sampled_from(["stop", "length"]))
@settings(max_examples=40, deadline=None)
async def test_a_text_that_is_not_flagged_arrives_whole_streamed_and_joined(
    text: str, cuts: list[int], finish: FinishReason
) -> None:
    (joined,) = await ask(ScriptedEngine(said_in([], text, finish)), logprobs=True)
    paced = ScriptedEngine(said_in(cuts, text, finish), is_paced=True)
    (streamed,) = await ask(paced, logprobs=True, stream=True)
    for got in (joined, streamed):
        assert got.text == text
        assert got.bytes == text.encode()
        assert got.finish_reasons == [finish]


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_violation_ends_its_choice_only(is_streamed: bool) -> None:
    def script(request: EngineRequest) -> list[Step]:
        bad = [token(request, FINE + PASSAGE + FINE, 1)]
        fine = [token(request, piece, index) for piece in FINE.split(" ") for index in (0, 2)]
        return [*bad, *fine, token(request, "", 0, finish="stop"), token(request, "", 2, finish="length")]

    engine, sink = ScriptedEngine(script), ListSink()
    services = make_services(engine, rules=rules(), sink=sink)
    async with client_of(build_app(services)) as client:
        asking = asyncio.create_task(client.post(CHAT, json=chat_body(n=3, stream=is_streamed)))
        await asyncio.wait_for(engine.has_cancel.wait(), 5)
        (running,) = engine.streams.values()
        running.push(token(running.request, "", 1, finish="cancelled"))
        response = await asyncio.wait_for(asking, 5)
    first, second, third = collect(response.text)

    assert [one.finish_reasons for one in (first, second, third)] == [["stop"], ["content_filter"], ["length"]]
    assert first.text == third.text == FINE.replace(" ", "")
    assert FINE.startswith(second.text)
    assert engine.cancelled == [(running.request.request_id, 1)]
    assert {one.choice_index: one.outcome for one in sink.decisions} == {
        None: "passed",
        0: "passed",
        1: "blocked",
        2: "passed",
    }
    flagged = services.metrics.registry.get_sample_value("causerie_flagged_total", {"direction": "output"})
    assert flagged == 1


async def test_a_choice_that_ended_by_itself_is_not_cancelled_when_its_end_is_flagged() -> None:
    engine = ScriptedEngine(said_in([], PASSAGE))
    (got,) = await ask(engine)
    assert (got.text, got.finish_reasons) == ("", ["content_filter"])
    assert engine.cancelled == []


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_echo_shows_the_prompt_and_withholds_the_answer(is_streamed: bool) -> None:
    (got,) = await ask(ScriptedEngine(said_in([], FINE + PASSAGE)), COMPLETIONS, echo=True, stream=is_streamed)
    assert got.finish_reasons == ["content_filter"]
    assert ("Hi" + FINE).startswith(got.text)
    assert len(got.text) > 40


async def test_a_passage_that_begins_in_the_prompt_is_seen_whole() -> None:
    prompts = ["how to make a pipe bo", "hello"]
    engine = ScriptedEngine(lambda request: say(request, "mb at home"))
    first, second, third, fourth = await ask(engine, COMPLETIONS, prompt=prompts, n=2)
    assert (first.text, first.finish_reasons) == (second.text, second.finish_reasons) == ("", ["content_filter"])
    assert (third.text, fourth.text) == ("mb at home", "mb at home")


async def test_a_prompt_that_was_let_pass_does_not_flag_its_answer() -> None:
    engine = ScriptedEngine(lambda request: say(request, "is the word you mean"))
    for mode in ("off", "log"):
        (got,) = await ask(engine, COMPLETIONS, prompt="a bomb ", force=rules(input=mode))
        assert got.finish_reasons == ["stop"]


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_token_that_a_stop_string_cuts_does_not_tell_what_follows(is_streamed: bool) -> None:
    """The stop string "b" leaves the space of a token that spells " bomb"."""

    class WideTokenizer(ByteTokenizer):
        token_bytes = (*ByteTokenizer.token_bytes[:200], b" bomb", *ByteTokenizer.token_bytes[201:])

    def script(request: EngineRequest) -> list[Step]:
        return [token(request, "a ", ids=[ord("a"), 200]), token(request, "", ids=[], finish="stop")]

    services = make_services(ScriptedEngine(script), model=make_model(tokenizer=WideTokenizer()), rules=rules())
    async with client_of(build_app(services)) as client:
        response = await client.post(CHAT, json=chat_body(logprobs=True, stop="b", stream=is_streamed))
    (got,) = collect(response.text)
    assert (got.text, got.finish_reasons) == ("a ", ["stop"])
    assert got.tokens == ["a"]


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_bytes_that_are_no_text_do_not_bring_later_tokens_forward(is_streamed: bool) -> None:
    """Each lone byte is shown as U+FFFD, which is three bytes: counted in bytes, withheld tokens would leave."""
    num_broken = 60
    encoded = [0xFF] * num_broken + list(PASSAGE.encode())
    text = "\ufffd" * num_broken + PASSAGE

    def script(request: EngineRequest) -> list[Step]:
        return [token(request, text, ids=encoded), token(request, "", ids=[EOS], finish="stop")]

    (got,) = await ask(ScriptedEngine(script), logprobs=True, stream=is_streamed)
    assert got.finish_reasons == ["content_filter"]
    assert set(got.text) <= {"\ufffd"}
    assert set(got.bytes) <= {0xFF}
    assert len(got.bytes) == len(got.text)


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_no_verdict_no_answer(is_streamed: bool) -> None:
    sink = ListSink()
    engine = ScriptedEngine(said_in([], FINE + "crash" + FINE))
    async with client_for(engine, rules=rules(), sink=sink) as client:
        response = await client.post(CHAT, json=chat_body(stream=is_streamed))
    assert "crash" not in response.text
    assert response.status_code == (200 if is_streamed else 503)
    if is_streamed:
        error = json.loads(response.text.split("\n\n")[-3].removeprefix("data: "))
        assert response.text.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"' not in response.text
    else:
        error = response.json()
    assert error["error"]["code"] == "moderation_unavailable"
    assert [(one.direction, one.outcome) for one in sink.decisions] == [
        ("input", "passed"),
        ("output", "failed_closed"),
    ]


@pytest.mark.parametrize(("mode", "fail"), [("block", "open"), ("log", "closed"), ("log", "open")])
async def test_without_a_verdict_the_answer_passes_where_the_rules_say_so(
    mode: ModerationMode, fail: OnFailure
) -> None:
    sink = ListSink()
    text = FINE + "crash" + FINE
    services = make_services(ScriptedEngine(said_in([], text)), rules=rules(mode, fail=fail), sink=sink)
    async with client_of(build_app(services)) as client:
        response = await client.post(CHAT, json=chat_body())
    assert response.json()["choices"][0]["message"]["content"] == text
    assert sink.decisions[-1].outcome == "failed_open"
    failed = services.metrics.registry.get_sample_value("causerie_moderation_failures_total", {"direction": "output"})
    assert failed


async def test_fail_open_still_stops_what_is_flagged() -> None:
    engine = ScriptedEngine(said_in([], "crash " + "x " * 200 + PASSAGE))
    (got,) = await ask(engine, force=rules(fail="open"))
    assert got.finish_reasons == ["content_filter"]
    assert "pipe" not in got.text


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("mode", "outcomes"), [("log", ["passed", "logged"]), ("off", ["passed"])])
async def test_log_records_and_off_does_not_judge_and_both_send_everything(
    mode: ModerationMode, outcomes: list[str], is_streamed: bool
) -> None:
    sink, policy = ListSink(), WordPolicy()
    text = FINE + PASSAGE + FINE
    engine = ScriptedEngine(said_in([50, 250], text))
    async with client_for(engine, rules=rules(mode, policy=policy), sink=sink) as client:
        response = await client.post(CHAT, json=chat_body(stream=is_streamed))
    assert '"finish_reason":"stop"' in response.text
    assert PASSAGE in response.text.replace('"}', "") or is_streamed
    assert [one.outcome for one in sink.decisions] == outcomes
    assert bool(policy.windows) == (mode == "log")


async def test_log_sends_before_it_judges() -> None:
    may_judge = threading.Event()

    class Waiting(WordPolicy):
        def judge_output(self, context: str, text: str) -> Verdict:
            assert may_judge.wait(5)
            return super().judge_output(context, text)

    async with answering(said_in([], FINE), rules("log", policy=Waiting())) as (answer, _):
        deltas = answer.deltas()
        (delta,) = await asyncio.wait_for(anext(deltas), 5)
        assert (delta.text, delta.finish_reason) == (FINE, "stop")
        may_judge.set()
        assert [one async for one in deltas] == []


async def test_a_slow_judgement_holds_up_nobody_else() -> None:
    may_judge = threading.Event()

    class Slow(WordPolicy):
        def judge_output(self, context: str, text: str) -> Verdict:
            if "slow" in text:
                assert may_judge.wait(5)
            return super().judge_output(context, text)

    def script(request: EngineRequest) -> list[Step]:
        assert isinstance(request, GenerateRequest)
        word = "slow " if b"slow" in bytes(request.prompt_ids) else "quick "
        return say(request, word * 40)

    async with client_for(ScriptedEngine(script), rules=rules(policy=Slow())) as client:
        slow = asyncio.create_task(client.post(CHAT, json=chat_body("slow")))
        for _ in range(3):
            quick = await asyncio.wait_for(client.post(CHAT, json=chat_body("quick")), 5)
            assert quick.json()["choices"][0]["message"]["content"] == "quick " * 40
        assert not slow.done()
        may_judge.set()
        assert (await slow).json()["choices"][0]["message"]["content"] == "slow " * 40


@pytest.mark.parametrize("records_text", [False, True])
async def test_a_withheld_passage_reaches_the_sink_only_if_the_rules_say_so(records_text: bool) -> None:
    sink = ListSink()
    engine = ScriptedEngine(said_in([], FINE + PASSAGE))
    async with client_for(engine, rules=rules(records_text=records_text), sink=sink) as client:
        await client.post(CHAT, json=chat_body())
    decision, (turn,) = sink.decisions[-1], sink.turns
    assert (decision.direction, decision.choice_index, decision.outcome) == ("output", 0, "blocked")
    assert decision.verdict is not None
    assert (decision.verdict.model, decision.verdict.reason) == ("words-1", "moderation")
    (choice,) = turn.choices
    assert choice.finish_reason == "content_filter"
    if records_text:
        assert decision.text is not None
        assert "bomb" in decision.text
        assert choice.token_ids
        assert turn.turns
    else:
        assert (decision.text, choice.text, choice.token_ids) == (None, "", ())
        assert (turn.turns, turn.prompt_ids) == ((), ())


async def test_the_operators_message_says_why_the_rest_is_missing() -> None:
    (got,) = await ask(ScriptedEngine(said_in([], PASSAGE)), force=rules(message="Not in this house."), stream=True)
    assert got.refusal == "Not in this house."


async def test_category_thresholds_stop_an_answer_too() -> None:
    classifier = WordClassifier({}, {Category.HATE: {"ugly": 0.6}})
    policy = Policy(classifier, PolicyOptions(output=Sensitivity(category_thresholds={"hate": 0.5})))
    (got,) = await ask(ScriptedEngine(said_in([], FINE + "ugly")), force=rules(policy=policy))
    assert got.finish_reasons == ["content_filter"]


@asynccontextmanager
async def answering(
    script: Callable[[EngineRequest], list[Step]], force: ModerationRules
) -> AsyncGenerator[tuple[Answer, ScriptedEngine]]:
    """One choice's answer as the routes make it, without HTTP around it."""
    engine = ScriptedEngine(script)
    services = make_services(engine, rules=force)
    sampling = SamplingParams(max_tokens=500, seed=1)
    generation = Generations(engine, services.metrics).start(RequestContext("id", 0.0), [[1]], [sampling], 1, "")
    try:
        yield (
            Answer(generation, make_model().tokenizer, Moderation(services, force, "id"), has_logprobs=False),
            engine,
        )
    finally:
        generation.close()


async def test_an_answer_that_nobody_reads_any_more_has_told_its_decision() -> None:
    """The client may hang up on the chunk that tells it the end."""
    async with answering(said_in([], FINE + PASSAGE), rules()) as (answer, _):
        deltas = answer.deltas()
        (delta,) = await anext(deltas)
        assert delta.finish_reason == "content_filter"
        assert answer.has_flagged
