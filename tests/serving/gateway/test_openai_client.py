"""The official client against a real uvicorn: what reaches the engine, and what the client makes of the answer."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import openai
import pytest
import uvicorn
from openai import AsyncOpenAI, AsyncStream
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

from moderation.categories import Category
from moderation.policy import load_policy
from serving.errors import EngineStopped, QueueFull
from serving.gateway.app import build_app
from serving.gateway.judging import WITHHELD
from serving.gateway.ports import GatewaySettings, ModerationRules, Services
from tests.serving.gateway.fakes import MODEL_ID, ScriptedEngine, make_rules, make_services, say, token

pytestmark = pytest.mark.system

KEY = "sk-test"
HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]


class StartedServer(uvicorn.Server):
    """Says when it listens, instead of being asked again and again."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_listening.set()


@asynccontextmanager
async def serving(services: Services) -> AsyncGenerator[str, None]:
    """The base URL of a server that ends with the block."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(build_app(services), log_level="warning", lifespan="off", timeout_graceful_shutdown=2)
    server = StartedServer(config)
    task = asyncio.create_task(server.serve([listener]))
    await asyncio.wait_for(server.is_listening.wait(), 10)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listener.close()


@asynccontextmanager
async def client_to(engine: ScriptedEngine, services: Services | None = None) -> AsyncGenerator[AsyncOpenAI, None]:
    services = services or make_services(engine, settings=GatewaySettings(api_key=KEY))
    async with (
        serving(services) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        yield client


async def test_joined_answer() -> None:
    async with client_to(ScriptedEngine(lambda request: say(request, "日本", "語"))) as client:
        answer = await client.chat.completions.create(model=MODEL_ID, messages=HI, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.message.content for choice in answer.choices] == ["日本語", "日本語"]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id is not None


async def test_streamed_answer_with_usage() -> None:
    engine = ScriptedEngine(lambda request: say(request, "日", "本", "😀"))
    async with client_to(engine) as client:
        stream = await client.chat.completions.create(
            model=MODEL_ID, messages=HI, n=2, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert len({chunk.id for chunk in chunks}) == 1
    texts, ends, roles = ["", ""], [], []
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        ends += [choice.index] if choice.finish_reason else []
        roles += [choice.index] if choice.delta.role else []
    assert texts == ["日本😀", "日本😀"]
    assert (sorted(ends), roles) == ([0, 1], [0, 1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 8


async def test_the_client_s_own_accumulation_of_a_stream() -> None:
    engine = ScriptedEngine(lambda request: say(request, "Hel", "lo"))
    async with (
        client_to(engine) as client,
        client.chat.completions.stream(model=MODEL_ID, messages=HI, logprobs=True, top_logprobs=1) as stream,
    ):
        answer = await stream.get_final_completion()
    assert answer.choices[0].message.content == "Hello"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == "Hello"


async def test_first_text_arrives_while_the_rest_is_still_to_come() -> None:
    engine = ScriptedEngine(lambda request: [token(request, "first")])
    async with client_to(engine) as client:
        stream = await client.chat.completions.create(model=MODEL_ID, messages=HI, stream=True)
        chunks = aiter(stream)
        assert (await anext(chunks)).choices[0].delta.role == "assistant"
        assert (await anext(chunks)).choices[0].delta.content == "first"
        (running,) = engine.streams.values()
        running.push(token(running.request, " last", finish="stop"))
        assert [chunk.choices[0].delta.content async for chunk in stream] == [" last", None]


async def test_completions_and_models() -> None:
    async with client_to(ScriptedEngine()) as client:
        completion = await client.completions.create(model=MODEL_ID, prompt=["a", "b"], logprobs=1, echo=True)
        stream = await client.completions.create(model=MODEL_ID, prompt="a", stream=True)
        text = "".join([chunk.choices[0].text async for chunk in stream])
        models = await client.models.list()
        model = await client.models.retrieve(MODEL_ID)
    assert [choice.text for choice in completion.choices] == ["aHello", "bHello"]
    assert completion.choices[0].logprobs is not None
    assert completion.choices[0].logprobs.tokens == list("aHello")
    assert text == "Hello"
    assert models.data == [model]


async def test_moderations() -> None:
    async with client_to(ScriptedEngine()) as client:
        answer = await client.moderations.create(input=["fine", "bomb"], model="omni-moderation-latest")
    assert [result.flagged for result in answer.results] == [False, True]
    assert answer.results[0].categories.hate is False


async def test_moderations_have_every_field_of_the_client_s_model() -> None:
    categories = [category.value for category in Category]
    services = make_services(rules=ModerationRules(policy=load_policy()))
    async with client_to(ScriptedEngine(), services) as client:
        one = await client.moderations.create(input=[{"type": "text", "text": "how do I kill a process"}])
    (result,) = one.results
    for part in (result.categories, result.category_scores, result.category_applied_input_types):
        fields = type(part).model_fields
        assert sorted(field.alias or name for name, field in fields.items()) == sorted(categories)
        assert sorted(part.model_dump(by_alias=True)) == sorted(categories)
    assert result.model_extra is not None
    assert set(result.model_extra) == {"causerie"}


async def test_a_withheld_answer_ends_the_client_s_stream_with_content_filter() -> None:
    text = "It is a fine day, and we go for a walk in the old park by the sea. Take a pipe bomb and go on."
    engine = ScriptedEngine(lambda request: say(request, *text.split(" ")))
    services = make_services(engine, rules=make_rules(output="block"))
    texts, tokens, ends = ["", ""], ["", ""], []
    async with client_to(engine, services) as client:
        stream = await client.chat.completions.create(model=MODEL_ID, messages=HI, n=2, logprobs=True, stream=True)
        async for chunk in stream:
            (choice,) = chunk.choices
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += "".join(
                entry.token for entry in (choice.logprobs and choice.logprobs.content) or []
            )
            ends += [(choice.index, choice.finish_reason, choice.delta.refusal)] if choice.finish_reason else []
        joined = await client.chat.completions.create(model=MODEL_ID, messages=HI)
    assert sorted(ends) == [(0, "content_filter", WITHHELD), (1, "content_filter", WITHHELD)]
    assert texts == tokens == [joined.choices[0].message.content] * 2
    assert text.replace(" ", "").partition("pipe")[0].startswith(texts[0])
    assert joined.choices[0].finish_reason == "content_filter"
    assert joined.choices[0].message.refusal == WITHHELD


async def test_errors_become_the_client_s_exceptions() -> None:
    engine = ScriptedEngine()
    async with client_to(engine) as client:
        create = client.chat.completions.create
        with pytest.raises(openai.BadRequestError) as flagged:
            await create(model=MODEL_ID, messages=[{"role": "user", "content": "bomb"}], stream=True)
        with pytest.raises(openai.BadRequestError) as refused:
            await create(model=MODEL_ID, messages=HI, logit_bias={"1": 5})
        with pytest.raises(openai.NotFoundError):
            await create(model="other", messages=HI)
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()
        engine.refusal = QueueFull("full", retry_after_s=1)
        with pytest.raises(openai.RateLimitError):
            await create(model=MODEL_ID, messages=HI)
        engine.refusal = EngineStopped("restarting", retry_after_s=1)
        with pytest.raises(openai.InternalServerError):
            await create(model=MODEL_ID, messages=HI)
    assert (flagged.value.code, flagged.value.param) == ("content_filter", "messages")
    assert refused.value.param == "logit_bias"


async def test_a_failure_in_the_middle_of_a_stream_is_an_exception() -> None:
    engine = ScriptedEngine(lambda request: [token(request, "Hel"), EngineStopped("the engine died")])
    texts: list[str | None] = []
    async with client_to(engine) as client:
        stream = await client.chat.completions.create(model=MODEL_ID, messages=HI, stream=True)
        with pytest.raises(openai.APIError, match="the engine died"):
            await read_into(texts, stream)
    assert texts == ["", "Hel"]


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_client_that_hangs_up_ends_its_work(is_streamed: bool) -> None:
    engine = ScriptedEngine(lambda request: [])
    async with client_to(engine) as client:
        asking = asyncio.create_task(
            client.chat.completions.create(model=MODEL_ID, messages=HI, stream=is_streamed)  # pyright: ignore
        )
        await asyncio.wait_for(engine.has_request.wait(), 5)
        asking.cancel()
        (running,) = engine.streams.values()
        await asyncio.wait_for(running.is_closed.wait(), 5)
    assert engine.abandoned == [running.request.request_id]


async def test_a_client_that_closes_its_stream_ends_its_work() -> None:
    engine = ScriptedEngine(lambda request: [token(request, "first")])
    async with client_to(engine) as client:
        stream = await client.chat.completions.create(model=MODEL_ID, messages=HI, stream=True)
        await anext(aiter(stream))
        await stream.close()
        (running,) = engine.streams.values()
        await asyncio.wait_for(running.is_closed.wait(), 5)
    assert engine.abandoned == [running.request.request_id]


async def test_thirty_two_streams_all_end() -> None:
    engine = ScriptedEngine(lambda request: say(request, *"abcdefgh"))
    async with client_to(engine) as client:

        async def read() -> str:
            stream = await client.chat.completions.create(model=MODEL_ID, messages=HI, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        assert await asyncio.gather(*(read() for _ in range(32))) == ["abcdefgh"] * 32


async def test_a_server_that_stops_ends_its_streams_with_an_error() -> None:
    engine = ScriptedEngine(lambda request: [token(request, "first")])
    services = make_services(engine)
    async with serving(services) as url:
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        stream = await client.chat.completions.create(model=MODEL_ID, messages=HI, stream=True)
        await anext(aiter(stream))
    with pytest.raises(openai.APIError, match="shutting down"):
        await read_into([], stream)
    await client.close()


async def read_into(texts: list[str | None], stream: AsyncStream[ChatCompletionChunk]) -> None:
    async for chunk in stream:
        texts.append(chunk.choices[0].delta.content)
