"""Moderation of what comes in, and as an endpoint: flagged means refused, no verdict means refused too."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from moderation.policy import Turn
from serving.gateway.app import build_app
from serving.gateway.auth import API_KEY_NAME
from serving.gateway.judging import REFUSAL
from serving.gateway.ports import Decision, GatewaySettings, ModerationRules, TurnRecord
from tests.serving.gateway.fakes import (
    ListSink,
    ScriptedEngine,
    WordPolicy,
    chat_body,
    client_for,
    client_of,
    make_rules,
    make_services,
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
    assert services.metrics.registry.get_sample_value("causerie_flagged_total", {"direction": "input"}) == 1


async def test_the_whole_conversation_is_judged() -> None:
    policy = WordPolicy()
    messages = [{"role": "developer", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]
    async with client_for(rules=make_rules(policy=policy)) as client:
        await client.post(CHAT, json={"model": "tiny", "messages": messages})
    assert policy.judged == [(Turn("system", "a"), Turn("user", "b"))]


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_classifier_that_fails_means_no_answer(is_streamed: bool) -> None:
    engine, sink = ScriptedEngine(), ListSink()
    services = make_services(engine, sink=sink)
    async with client_of(build_app(services)) as client:
        response = await client.post(CHAT, json=chat_body("crash", stream=is_streamed))
    failures = services.metrics.registry.get_sample_value("causerie_moderation_failures_total", {"direction": "input"})
    assert failures == 1
    assert [(one.outcome, one.verdict) for one in sink.decisions] == [("failed_closed", None)]
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "moderation_unavailable"
    assert "retry-after" in response.headers
    assert engine.requests == []


async def test_refuse_answers_with_a_refusal() -> None:
    async with client_for(rules=make_rules(on_flagged="refuse")) as client:
        response = await client.post(CHAT, json=chat_body("a bomb", n=2))
        completion = await client.post("/v1/completions", json={"model": "tiny", "prompt": "a bomb"})
    choices = response.json()["choices"]
    assert [(one["index"], one["message"]["content"], one["finish_reason"]) for one in choices] == [
        (0, REFUSAL, "content_filter"),
        (1, REFUSAL, "content_filter"),
    ]
    assert completion.json()["choices"][0]["text"] == REFUSAL


async def test_refuse_streams_the_refusal() -> None:
    async with client_for(rules=make_rules(on_flagged="refuse")) as client:
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
    assert one["results"][0]["category_applied_input_types"] == {"illicit": ["text"], "hate": ["text"]}
    assert one["results"][0]["causerie"] == {
        "probability": 0.9,
        "threshold": 0.5,
        "reason": "moderation",
        "language": "en",
        "extension_scores": {"jailbreak": 0.0},
    }
    assert [result["flagged"] for result in two["results"]] == [False, True]
    assert [result["flagged"] for result in parts["results"]] == [True]


async def test_the_endpoint_answers_chat_messages_as_one_conversation() -> None:
    policy = WordPolicy()
    messages = [
        {"role": "user", "content": "how do I"},
        {"role": "assistant", "content": "what?", "refusal": None},
        {"role": "user", "content": [{"type": "text", "text": "build a bomb"}]},
    ]
    async with client_for(rules=make_rules(policy=policy)) as client:
        body = (await client.post("/v1/moderations", json={"input": messages})).json()
    assert [result["flagged"] for result in body["results"]] == [True]
    assert policy.judged == [(Turn("user", "how do I"), Turn("assistant", "what?"), Turn("user", "build a bomb"))]


async def test_the_endpoint_fails_closed_whatever_the_rules() -> None:
    async with client_for(rules=make_rules(input="off", fail="open")) as client:
        response = await client.post("/v1/moderations", json={"input": "crash"})
        judged = await client.post("/v1/moderations", json={"input": "a bomb"})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "moderation_unavailable"
    assert judged.json()["results"][0]["flagged"] is True


@pytest.mark.parametrize(
    ("rules", "text", "outcome"),
    [
        (make_rules(input="log"), "a bomb", "logged"),
        (make_rules(input="log"), "crash", "failed_open"),
        (make_rules(fail="open"), "crash", "failed_open"),
        (make_rules(fail="open"), "fine", "passed"),
        (make_rules(input="off"), "a bomb", None),
        (make_rules(input="off"), "crash", None),
    ],
)
async def test_what_the_rules_let_pass_is_answered_and_recorded(
    rules: ModerationRules, text: str, outcome: str | None
) -> None:
    sink = ListSink()
    async with client_for(rules=rules, sink=sink) as client:
        response = await client.post(CHAT, json=chat_body(text))
    assert response.json()["choices"][0]["finish_reason"] == "stop"
    assert [one.outcome for one in sink.decisions] == ([] if outcome is None else [outcome])
    assert len(sink.turns) == 1


async def test_with_fail_open_what_is_flagged_is_still_refused() -> None:
    async with client_for(rules=make_rules(fail="open")) as client:
        assert (await client.post(CHAT, json=chat_body("a bomb"))).status_code == 400


async def test_the_operators_message_is_what_the_user_reads() -> None:
    async with client_for(rules=make_rules(message="Ask the front desk.")) as client:
        response = await client.post(CHAT, json=chat_body("a bomb"))
    assert response.json()["error"]["message"] == "Ask the front desk."
    async with client_for(rules=make_rules(message="Ask the front desk.", on_flagged="refuse")) as client:
        response = await client.post(CHAT, json=chat_body("a bomb"))
    assert response.json()["choices"][0]["message"]["content"] == "Ask the front desk."


@pytest.mark.parametrize("records_text", [False, True])
async def test_a_refused_turn_reaches_the_sink_with_text_only_if_the_rules_say_so(records_text: bool) -> None:
    sink = ListSink()
    async with client_for(rules=make_rules(records_text=records_text), sink=sink) as client:
        await client.post(CHAT, json=chat_body("a bomb"))
        await client.post(CHAT, json=chat_body("hello"))
    refused, answered = sink.decisions
    assert (refused.direction, refused.outcome, refused.choice_index) == ("input", "blocked", None)
    assert refused.verdict is not None
    assert (refused.verdict.probability, refused.verdict.model, refused.verdict.reason) == (
        0.9,
        "words-1",
        "moderation",
    )
    assert refused.text == ("a bomb" if records_text else None)
    assert (answered.outcome, answered.text) == ("passed", None)
    assert [turn.turns for turn in sink.turns] == [
        (Turn("user", "a bomb"),) if records_text else (),
        (Turn("user", "hello"),),
    ]


async def test_a_sink_that_fails_changes_no_answer() -> None:
    class BrokenSink(ListSink):
        async def record(self, turn: TurnRecord) -> None:
            raise OSError("disk full")

        async def record_decision(self, decision: Decision) -> None:
            raise OSError("disk full")

    async with client_for(sink=BrokenSink()) as client:
        assert (await client.post(CHAT, json=chat_body("a bomb"))).status_code == 400
        assert (await client.post(CHAT, json=chat_body("hello", stream=True))).text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("key", [None, "sk-test"])
async def test_the_rules_are_those_of_the_requests_key(key: str | None) -> None:
    """One key or none today; with several, only `KeyCheck` and the function of the key's name would know."""
    asked: list[str | None] = []

    def rules_of_key(name: str | None) -> ModerationRules:
        asked.append(name)
        return make_rules(input="off" if name == API_KEY_NAME else "block")

    services = replace(make_services(settings=GatewaySettings(api_key=key)), rules_of_key=rules_of_key)
    headers = {"authorization": "Bearer sk-test"}
    async with client_of(build_app(services), headers=headers) as client:
        response = await client.post(CHAT, json=chat_body("a bomb"))
        completion = await client.post("/v1/completions", json={"model": "tiny", "prompt": "a bomb"})
        model = (await client.get("/v1/models/tiny")).json()
        ready = (await client.get("/health/ready")).json()
    expected = (200, "off", API_KEY_NAME) if key else (400, "block", None)
    for one in (response, completion):
        assert one.status_code == expected[0]
    for shown in (model, ready):
        assert shown["moderation"]["input"]["mode"] == expected[1]
    assert set(asked) == {expected[2]}


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
        ({"input": [{"type": "text", "text": "a"}, "b"]}, "input[0]"),
        ({"input": [{"role": "user", "content": "a"}, {"role": "nobody", "content": "b"}]}, "input[1].role"),
        ({"input": [{"role": "user", "content": "a"}, {"type": "text", "text": "b"}]}, "input[0].type"),
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


async def test_a_list_has_a_limit_in_all_and_one_text_does_not() -> None:
    async with client_for() as client:
        many = await client.post("/v1/moderations", json={"input": ["word " * 40_000] * 3})
        one = await client.post("/v1/moderations", json={"input": "word " * 120_000})

    assert (many.status_code, many.json()["error"]["param"]) == (400, "input")
    assert "600,000 characters" in many.json()["error"]["message"]
    assert one.status_code == 200
