"""The strict table: every field of the official client is implemented, accepted at its default, or refused by name."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest
from openai.types import completion_create_params, moderation_create_params
from openai.types.chat import completion_create_params as chat_create_params

from serving.errors import InvalidRequest
from serving.gateway.fields import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    MESSAGE_FIELDS,
    MODERATION_FIELDS,
    TABLES,
    Field,
    HintKind,
    JsonObject,
    JsonValue,
    Treatment,
    check_fields,
    is_same_json,
    render_tables,
)
from serving.gateway.ports import RequestLimits
from serving.gateway.schemas import parse_chat, parse_completion
from tests.serving.gateway.fakes import ScriptedEngine, chat_body, client_for

pytestmark = pytest.mark.unit

LIMITS = RequestLimits(max_messages=3, max_choices=4, max_stop=2, max_stop_length=5, max_tokens=100)

# A good value for every implemented field that stands alone.
GOOD: dict[str, JsonValue] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hi"}],
    "prompt": "Hi",
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.5,
    "seed": 5,
    "stop": "x",
    "ignore_eos": True,
    "n": 2,
    "max_completion_tokens": 5,
    "max_tokens": 5,
    "logprobs": True,
    "top_logprobs": 5,
    "echo": False,
}
NEEDS: dict[str, JsonObject] = {"stream_options": {"stream": True}, "top_logprobs": {"logprobs": True}}
ROUTES: dict[str, tuple[tuple[Field, ...], JsonObject]] = {
    "/v1/chat/completions": (CHAT_FIELDS, {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}),
    "/v1/completions": (COMPLETION_FIELDS, {"model": "tiny", "prompt": "Hi"}),
}
CASES = [(path, field) for path, (fields, _) in ROUTES.items() for field in fields]
CASE_IDS = [f"{path}-{field.name}" for path, field in CASES]


async def status_and_error(path: str, extra: JsonObject) -> tuple[int, JsonObject]:
    base = ROUTES[path][1]
    async with client_for(ScriptedEngine()) as client:
        response = await client.post(path, json={**base, **extra})
    is_json = response.headers["content-type"] == "application/json"
    return response.status_code, response.json().get("error", {}) if is_json else {}


def good_value(path: str, field: Field) -> JsonValue:
    if path == "/v1/completions" and field.name == "logprobs":
        return 2
    return GOOD[field.name]


@pytest.mark.parametrize(("path", "field"), CASES, ids=CASE_IDS)
async def test_every_field_of_the_table_does_what_the_table_says(path: str, field: Field) -> None:
    if field.treatment is Treatment.IMPLEMENTED:
        status, error = await status_and_error(path, {**NEEDS.get(field.name, {}), field.name: good_value(path, field)})
        assert status == 200, error
        status, error = await status_and_error(path, {field.name: {"never": "valid"}})
        assert (status, str(error["param"]).partition(".")[0]) == (400, field.name)
        return
    accepted: tuple[JsonValue, ...] = (None, *field.allowed)
    if field.treatment is Treatment.HINT:
        accepted = (None, {"a": "b"} if field.hint_kind is HintKind.STRING_MAP else "a")
    refused: tuple[JsonValue, ...] = (["something else"], 17)
    for value in accepted:
        status, error = await status_and_error(path, {field.name: value})
        assert status == 200, error
    for value in refused:
        status, error = await status_and_error(path, {field.name: value})
        assert (status, error["param"], error["type"]) == (400, field.name, "invalid_request_error")


@pytest.mark.parametrize(("path", "field"), CASES, ids=CASE_IDS)
async def test_null_is_as_good_as_absent(path: str, field: Field) -> None:
    status, error = await status_and_error(path, {field.name: None})
    assert status == (400 if field.name in ("model", "messages", "prompt") else 200), error


def params_of(module: object, *names: str) -> set[str]:
    return {key for name in names for key in typing.get_type_hints(getattr(module, name))}


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        (CHAT_FIELDS, params_of(chat_create_params, "CompletionCreateParamsStreaming")),
        (COMPLETION_FIELDS, params_of(completion_create_params, "CompletionCreateParamsStreaming")),
        (MODERATION_FIELDS, params_of(moderation_create_params, "ModerationCreateParams")),
    ],
)
def test_the_table_knows_every_field_of_the_official_client(fields: tuple[Field, ...], params: set[str]) -> None:
    assert params - {field.name for field in fields} == set()


@pytest.mark.parametrize("path", ROUTES)
async def test_an_unknown_field_is_refused_by_name(path: str) -> None:
    status, error = await status_and_error(path, {"min_p": 0.1})
    assert (status, error["param"]) == (400, "min_p")
    assert "min_p" in str(error["message"])


async def test_an_unknown_field_is_refused_by_its_path() -> None:
    messages: JsonValue = [{"role": "user", "content": "Hi", "cache_control": {}}]
    status, error = await status_and_error("/v1/chat/completions", {"messages": messages})
    assert (status, error["param"]) == (400, "messages[0].cache_control")
    status, error = await status_and_error("/v1/chat/completions", {"stream": True, "stream_options": {"x": 1}})
    assert (status, error["param"]) == (400, "stream_options.x")


def test_true_is_not_one() -> None:
    assert not is_same_json(True, 1)
    with pytest.raises(InvalidRequest, match="best_of"):
        check_fields({"best_of": True}, COMPLETION_FIELDS)


def test_every_field_has_one_row() -> None:
    for title, fields in TABLES.items():
        names = [field.name for field in fields]
        assert len(names) == len(set(names)), title


def test_the_documentation_is_the_table() -> None:
    documentation = (Path(__file__).parents[3] / "docs" / "api.md").read_text(encoding="utf-8")
    assert render_tables().strip() in documentation, "put the output of python -m serving.gateway.fields in docs/api.md"


def test_messages_that_a_client_got_from_us_can_be_sent_back() -> None:
    answered: JsonObject = {"role": "assistant", "content": "Hello", "refusal": None, "annotations": []}
    check_fields(answered, MESSAGE_FIELDS)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": 2**40}, "top_k"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": 10**5000}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"n": 1.0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 101}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"stop": ["a", "b", "c"]}, "stop"),
        ({"stop": "sixsix"}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": {}}, "stop"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}] * 4}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": "a", "name": "Ann"}]}, "messages[0].name"),
        ({"model": 5}, "model"),
        ({"model": None}, "model"),
    ],
)
def test_values_out_of_range_are_refused_by_name(extra: JsonObject, param: str) -> None:
    body: JsonObject = {**chat_body(), **extra}  # pyright: ignore
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(body, LIMITS)
    assert caught.value.param == param
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["a", "b", "c"], "n": 2}, "prompt"),
        ({"logprobs": 6}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"echo": True, "logprobs": 1, "stream": True}, "echo"),
    ],
)
def test_completion_values_out_of_range_are_refused_by_name(extra: JsonObject, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_completion({"model": "tiny", "prompt": "a", **extra}, LIMITS)
    assert caught.value.param == param
