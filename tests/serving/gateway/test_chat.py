"""POST /v1/chat/completions as one joined answer: shape, sampling, limits, what the engine is asked."""

from __future__ import annotations

import httpx
import pytest

from serving.engine.requests import EngineRequest
from serving.errors import EngineStopped, QueueFull
from serving.gateway.app import build_app
from serving.gateway.ports import GenerationDefaults
from serving.model.chat_format import ChatFormatError, ChatMessage
from tests.serving.gateway.fakes import (
    EOS,
    MODEL_ID,
    ListSink,
    PlainChatFormat,
    ScriptedEngine,
    Step,
    chat_body,
    client_for,
    client_of,
    fail,
    make_model,
    make_services,
    say,
    token,
)

pytestmark = pytest.mark.unit


async def post(engine: ScriptedEngine | None = None, *, text: str = "Hi", **fields: object) -> httpx.Response:
    async with client_for(engine) as client:
        return await client.post("/v1/chat/completions", json=chat_body(text, **fields))


async def test_answer_has_the_shape_of_a_chat_completion() -> None:
    response = await post(ScriptedEngine(lambda request: say(request, "Hel", "lo 😀")))
    body = response.json()
    assert response.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["model"] == MODEL_ID
    assert body["id"] == f"chatcmpl-{response.headers['x-request-id']}"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello 😀", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    num_prompt = len("user:Hi\n")
    num_answer = len("Hello 😀".encode()) + 1
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_choices_keep_their_indices_when_their_events_interleave() -> None:
    def script(request: EngineRequest) -> list[Step]:
        return [
            token(request, "b1", 1),
            token(request, "a1", 0),
            token(request, "a2", 0, finish="length"),
            token(request, "b2", 1, finish="stop"),
        ]

    response = await post(ScriptedEngine(script), n=2)
    choices = response.json()["choices"]
    assert [(one["index"], one["message"]["content"], one["finish_reason"]) for one in choices] == [
        (0, "a1a2", "length"),
        (1, "b1b2", "stop"),
    ]


async def test_logprobs_spell_the_text_and_leave_out_the_end_of_turn_token() -> None:
    response = await post(ScriptedEngine(lambda request: say(request, "é!")), logprobs=True, top_logprobs=2)
    content = response.json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "é!"
    assert content[-1] == {
        "token": "!",
        "logprob": -0.5,
        "bytes": [33],
        "top_logprobs": [
            {"token": "!", "logprob": -0.5, "bytes": [33]},
            {"token": "z", "logprob": -9999.0, "bytes": [122]},
        ],
    }


async def test_tokens_of_a_stop_string_have_no_logprobs() -> None:
    def script(request: EngineRequest) -> list[Step]:
        return [
            token(request, "ab", ids=list(b"ab##")),
            token(request, "", ids=list(b"#"), finish="stop"),
        ]

    response = await post(ScriptedEngine(script), logprobs=True, stop="###")
    content = response.json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["a", "b"]


async def test_fields_reach_the_engine() -> None:
    engine = ScriptedEngine()
    await post(
        engine,
        temperature=0,
        top_p=0.5,
        top_k=7,
        presence_penalty=1,
        frequency_penalty=-1.5,
        repetition_penalty=1.1,
        seed=-1,
        stop=["a", "b"],
        ignore_eos=True,
        max_completion_tokens=9,
        n=3,
        logprobs=True,
    )
    request = engine.generated
    sampling = request.sampling
    assert request.num_choices == 3
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 7)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1.5, 1.1)
    assert (sampling.seed, sampling.stop, sampling.ignore_eos) == (2**63 - 1, ("a", "b"), True)
    assert (sampling.max_tokens, sampling.num_top_logprobs) == (9, 0)


async def test_absent_fields_take_the_model_s_defaults_then_openai_s() -> None:
    engine = ScriptedEngine()
    model = make_model(defaults=GenerationDefaults(temperature=0.6, top_k=20))
    async with client_of(build_app(make_services(engine, model=model))) as client:
        await client.post("/v1/chat/completions", json=chat_body())
    sampling = engine.generated.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (0.6, 1.0, 20, 1.0)
    assert sampling.num_top_logprobs is None


async def test_seeds_differ_between_requests_without_one() -> None:
    engine = ScriptedEngine()
    async with client_for(engine) as client:
        for _ in range(2):
            await client.post("/v1/chat/completions", json=chat_body())
    first, second = engine.requests
    assert first.sampling.seed != second.sampling.seed  # pyright: ignore


async def test_max_tokens_defaults_to_and_is_cut_to_what_the_context_has_left() -> None:
    asked: tuple[dict[str, object], ...] = ({}, {"max_tokens": 30_000})
    for fields in asked:
        engine = ScriptedEngine()
        engine.max_context = 100
        async with client_for(engine) as client:
            await client.post("/v1/chat/completions", json=chat_body("Hi", **fields))
        assert engine.generated.sampling.max_tokens == 100 - len("user:Hi\n")


async def test_too_long_a_prompt_is_refused_with_both_numbers_before_it_is_queued() -> None:
    engine = ScriptedEngine()
    engine.max_context = 100
    response = await post(engine, text="x" * 2000)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "messages"
    assert "2,006 tokens" in error["message"]
    assert "99" in error["message"]
    assert engine.requests == []


async def test_roles_and_text_parts_reach_the_chat_format() -> None:
    model = make_model()
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "tool", "content": "d", "tool_call_id": "call_1"},
    ]
    async with client_of(build_app(make_services(model=model))) as client:
        response = await client.post("/v1/chat/completions", json={"model": MODEL_ID, "messages": messages})
    assert response.status_code == 200
    assert isinstance(model.chat_format, PlainChatFormat)
    assert list(model.chat_format.rendered[0]) == [
        ChatMessage("system", "be brief"),
        ChatMessage("user", "ab"),
        ChatMessage("assistant", "c"),
        ChatMessage("tool", "d"),
    ]


async def test_messages_that_the_template_refuses_are_a_400() -> None:
    class Refusing(PlainChatFormat):
        def render(self, *_args: object, **_kwargs: object) -> list[int]:
            raise ChatFormatError("roles must alternate")

    async with client_of(build_app(make_services(model=make_model(chat_format=Refusing())))) as client:
        response = await client.post("/v1/chat/completions", json=chat_body())
    assert response.status_code == 400
    assert "alternate" in response.json()["error"]["message"]


async def test_a_base_model_refuses_chat_and_names_the_alternative() -> None:
    async with client_of(build_app(make_services(model=make_model(chat_format=None)))) as client:
        response = await client.post("/v1/chat/completions", json=chat_body())
    assert response.status_code == 400
    assert "/v1/completions" in response.json()["error"]["message"]


async def test_another_model_s_name_is_a_404() -> None:
    response = await post(model="gpt-4o")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert response.json()["error"]["param"] == "model"


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_full_queue_is_a_429_with_retry_after(is_streamed: bool) -> None:
    engine = ScriptedEngine()
    engine.refusal = QueueFull("256 sequences are waiting", retry_after_s=3)
    response = await post(engine, stream=is_streamed)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    assert response.json()["error"]["code"] == "queue_full"


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("context_length_exceeded", 400),
        ("invalid_request_error", 400),
        ("queue_full", 429),
        ("engine_stopped", 503),
        ("internal_error", 500),
    ],
)
async def test_what_fails_before_the_first_token_has_its_own_status(code: str, status: int, is_streamed: bool) -> None:
    engine = ScriptedEngine(lambda request: [fail(request, code, "no")])
    response = await post(engine, stream=is_streamed)
    assert response.status_code == status
    assert response.json()["error"]["message"] == "no"


async def test_an_engine_that_dies_in_the_middle_fails_the_joined_answer() -> None:
    stopped = EngineStopped("the engine process died", retry_after_s=5)
    response = await post(ScriptedEngine(lambda request: [token(request, "Hel"), stopped]))
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"


async def test_a_stream_that_ends_without_a_finish_reason_is_an_error() -> None:
    class Short(ScriptedEngine):
        def submit(self, request: object) -> object:  # pyright: ignore
            stream = super().submit(request)  # pyright: ignore
            stream._num_open = 0
            return stream

    response = await post(Short(lambda request: []))
    assert response.status_code == 503


async def test_a_finished_turn_is_recorded() -> None:
    sink = ListSink()
    async with client_of(build_app(make_services(sink=sink))) as client:
        for is_streamed in (False, True):
            await client.post("/v1/chat/completions", json=chat_body(stream=is_streamed))
    joined, streamed = sink.turns
    assert joined.choices == streamed.choices
    assert joined.choices[0].text == "Hello"
    assert joined.choices[0].token_ids == (*b"Hello", EOS)
    assert joined.prompt_ids == tuple(b"user:Hi\n")
