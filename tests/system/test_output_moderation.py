"""Moderation in both directions through a real server, engine and client: what is in force, and that nothing leaks."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

from serving.models import RELEASED_MODEL
from tests.system.server_process import START_TIMEOUT_S, ServerProcess, running_server

pytestmark = pytest.mark.system

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me about the sea."}]
# Whatever the model says is a violation by this threshold, and what the user says is let pass.
STRICTEST = {
    "CAUSERIE_MODERATION_THRESHOLD": "0.000000001",
    "CAUSERIE_MODERATION_INPUT_MODE": "log",
    "CAUSERIE_MODERATION_MESSAGE": "Not in this house.",
}


@pytest.fixture(scope="module")
def strict_server() -> Generator[ServerProcess]:
    with running_server("--model", RELEASED_MODEL, environ=STRICTEST) as process:
        process.wait_for_line("ready", START_TIMEOUT_S)
        yield process


def test_nothing_of_a_flagged_answer_reaches_the_client(strict_server: ServerProcess) -> None:
    with OpenAI(base_url=f"{strict_server.base_url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model=RELEASED_MODEL, messages=HI, n=2, max_tokens=60, logprobs=True, stream=True
        )
        chunks = list(stream)
        joined = client.chat.completions.create(model=RELEASED_MODEL, messages=HI, max_tokens=60, logprobs=True)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert [choice.delta.content for choice in choices if choice.delta.content] == []
    assert [choice.logprobs for choice in choices if choice.logprobs and choice.logprobs.content] == []
    ends = sorted(
        (choice.index, choice.finish_reason, choice.delta.refusal) for choice in choices if choice.finish_reason
    )
    assert ends == [(index, "content_filter", "Not in this house.") for index in range(2)]
    (choice,) = joined.choices
    assert (choice.message.content, choice.finish_reason) == ("", "content_filter")
    assert choice.logprobs is not None
    assert choice.logprobs.content == []
    assert strict_server.metric("causerie_flagged_total") >= 3 + 2  # each answer's choices, and the logged inputs


def test_a_stopped_choice_gives_its_place_back(strict_server: ServerProcess) -> None:
    with OpenAI(base_url=f"{strict_server.base_url}/v1", api_key="none", max_retries=0) as client:
        client.chat.completions.create(model=RELEASED_MODEL, messages=HI, max_tokens=400)
    assert strict_server.metric("causerie_sequences_running") == 0


def test_the_server_says_what_is_in_force(strict_server: ServerProcess) -> None:
    with strict_server.client() as client:
        ready = client.get("/health/ready").json()["moderation"]
        (model,) = client.get("/v1/models").json()["data"]
    assert model["moderation"] == ready
    assert (ready["input"]["mode"], ready["output"]["mode"]) == ("log", "block")
    assert ready["output"]["threshold"] == 1e-9
