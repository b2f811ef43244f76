"""Moderation in the request path and as an endpoint: flagged means refused, no verdict means refused too."""

from __future__ import annotations

import json

import pytest

from moderation.policy import Turn
from moderation.stream_filter import Release
from serving.engine.requests import FinishReason, SamplingParams, TokenEvent
from serving.gateway.app import build_app
from serving.gateway.choices import Answer, Choice, ChoiceDelta
from serving.gateway.generation import Generations
from serving.gateway.judging import INLINE_CHARACTERS, REFUSAL
from serving.gateway.ports import GatewaySettings
from serving.gateway.request_context import RequestContext
from tests.serving.gateway.fakes import (
    ScriptedEngine,
    WordPolicy,
    chat_body,
    client_for,
    client_of,
    make_model,
    make_services,
    token,
)

pytestmark = pytest.mark.unit

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_flagged_input_is_a_400_before_anything_is_queued(is_streamed: bool) -> None:
    engine = ScriptedEngine()
    services = make_services(engine)
    async with client_of(build_app(services)) as client:
        response = await client.post(CHAT, json=chat_body("a bomb", stream=is_streamed))
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert (error["code"], error["param"], error["type"]) == ("content_filter", "messages", "invalid_request_error")
    assert error["innererror"]["code"] == "ResponsibleAIPolicyViolation"
    assert error["innererror"]["content_filter_result"]["moderation"] == {"filtered": True, "score": 0.9}
    assert engine.requests == []
    assert services.metrics.registry.get_sample_value("causerie_flagged_total") == 1


async def test_the_whole_conversation_is_judged() -> None:
    services = make_services()
    messages = [{"role": "developer", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]
    async with client_of(build_app(services)) as client:
        await client.post(CHAT, json={"model": "tiny", "messages": messages})
    assert isinstance(services.policy, WordPolicy)
    assert services.policy.judged == [(Turn("system", "a"), Turn("user", "b"))]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("num_characters", [0, INLINE_CHARACTERS + 1])
async def test_a_classifier_that_fails_means_no_answer(is_streamed: bool, num_characters: int) -> None:
    engine = ScriptedEngine()
    async with client_for(engine) as client:
        response = await client.post(CHAT, json=chat_body("crash" + "x" * num_characters, stream=is_streamed))
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "moderation_unavailable"
    assert "retry-after" in response.headers
    assert engine.requests == []


async def test_refuse_answers_with_a_refusal() -> None:
    async with client_for(settings=GatewaySettings(on_flagged="refuse")) as client:
        response = await client.post(CHAT, json=chat_body("a bomb", n=2))
        completion = await client.post("/v1/completions", json={"model": "tiny", "prompt": "a bomb"})
    choices = response.json()["choices"]
    assert [(one["index"], one["message"]["content"], one["finish_reason"]) for one in choices] == [
        (0, REFUSAL, "content_filter"),
        (1, REFUSAL, "content_filter"),
    ]
    assert completion.json()["choices"][0]["text"] == REFUSAL


async def test_refuse_streams_the_refusal() -> None:
    async with client_for(settings=GatewaySettings(on_flagged="refuse")) as client:
        response = await client.post(
            CHAT, json=chat_body("a bomb", stream=True, stream_options={"include_usage": True})
        )
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert done == "[DONE]"
    assert json.loads(usage)["choices"] == []
    shown = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert [one["delta"].get("content") for one in shown] == ["", REFUSAL, None]
    assert [one["finish_reason"] for one in shown] == [None, None, "content_filter"]


async def test_the_endpoint_answers_a_string_or_a_list() -> None:
    async with client_for() as client:
        one = (await client.post("/v1/moderations", json={"input": "a bomb"})).json()
        two = (await client.post("/v1/moderations", json={"input": ["fine", "a bomb"]})).json()
        parts = (await client.post("/v1/moderations", json={"input": [{"type": "text", "text": "bomb"}]})).json()
    assert one["id"].startswith("modr-")
    assert one["model"] == "words-1"
    assert one["results"][0]["flagged"] is True
    assert one["results"][0]["categories"] == {"illicit": True, "hate": False}
    assert one["results"][0]["category_scores"] == {"illicit": 0.9, "hate": 0.0}
    assert [result["flagged"] for result in two["results"]] == [False, True]
    assert [result["flagged"] for result in parts["results"]] == [True]


async def test_the_endpoint_answers_before_the_model_is_ready() -> None:
    services = make_services()
    services.readiness.model = None
    async with client_of(build_app(services)) as client:
        assert (await client.post("/v1/moderations", json={"input": "fine"})).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [1]}, "input[0]"),
        ({"input": [{"type": "image_url"}]}, "input[0].type"),
        ({"input": "a", "model": 1}, "model"),
        ({"input": "a", "lang": "en"}, "lang"),
    ],
)
async def test_the_endpoint_is_strict(body: dict[str, object], param: str) -> None:
    async with client_for() as client:
        response = await client.post("/v1/moderations", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_the_endpoint_knows_openai_s_names_and_its_own() -> None:
    async with client_for() as client:
        for model, status in (("omni-moderation-latest", 200), ("words-1", 200), ("other", 404)):
            response = await client.post("/v1/moderations", json={"input": "a", "model": model})
            assert response.status_code == status


class HoldingFilter:
    """Holds the last piece back; stops at "stop"."""

    def __init__(self) -> None:
        self.held = ""

    def feed(self, text: str) -> Release:
        if "stop" in text:
            return Release(self.held, is_stopped=True)
        released, self.held = self.held, text
        return Release(released)

    def finish(self) -> Release:
        return Release(self.held)


def test_only_what_the_filter_releases_leaves() -> None:
    choice = Choice(0, HoldingFilter(), None)
    assert choice.apply([piece("a")]) is None
    assert choice.apply([piece("b")]) == ChoiceDelta(0, "a", [])
    assert choice.apply([piece("c", finish="length")]) == ChoiceDelta(0, "bc", [], "length")
    assert choice.text == "abc"


def test_a_filter_that_stops_ends_the_choice() -> None:
    choice = Choice(0, HoldingFilter(), None)
    choice.apply([piece("a")])
    assert choice.apply([piece("stop"), piece("b")]) == ChoiceDelta(0, "a", [], "content_filter")
    assert choice.apply([piece("more", finish="stop")]) is None
    assert choice.text == "a"


async def test_a_filter_that_stops_cancels_the_choice_in_the_engine() -> None:
    engine = ScriptedEngine(
        lambda request: [token(request, "stop", 0), token(request, "b", 1), token(request, "", 1, finish="stop")]
    )
    services = make_services(engine)
    context = RequestContext("id", 0.0)
    sampling = SamplingParams(max_tokens=5, seed=1)
    generation = Generations(engine, services.metrics).start(context, [[1]], [sampling], 2)
    answer = Answer(generation, make_model().tokenizer, HoldingFilter, has_logprobs=False)
    async for deltas in answer.deltas():
        assert {delta.index: delta.finish_reason for delta in deltas} == {0: "content_filter", 1: "stop"}
        break
    assert engine.cancelled == [("id.0", 0)]
    generation.close()


def piece(text: str, finish: FinishReason | None = None) -> TokenEvent:
    return TokenEvent(request_id="id", choice_index=0, token_ids=[], text=text, finish_reason=finish)
