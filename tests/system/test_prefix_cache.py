"""A conversation over HTTP: its second turn finds the first one, and says what it would have said without."""

from __future__ import annotations

import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from quant.native.library import load_library
from tests.system.server_process import MODEL, START_TIMEOUT_S, ServerProcess, running_server

pytestmark = pytest.mark.system

FIRST: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "Write three short sentences about the sea, the wind and the ships that cross it."}
]
NEXT: ChatCompletionMessageParam = {"role": "user", "content": "Now say them again, with a fourth one about birds."}


def ask(server: ServerProcess, messages: list[ChatCompletionMessageParam]) -> ChatCompletion:
    with OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as client:
        return client.chat.completions.create(model=MODEL, messages=messages, max_tokens=60, seed=11, temperature=0.7)


def num_cached(answer: ChatCompletion) -> int:
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    return answer.usage.prompt_tokens_details.cached_tokens or 0


def second_turn_of(first: ChatCompletion) -> list[ChatCompletionMessageParam]:
    return [*FIRST, {"role": "assistant", "content": first.choices[0].message.content or ""}, NEXT]


def test_the_second_turn_finds_the_first_and_its_answer(server: ServerProcess) -> None:
    first = ask(server, FIRST)
    second = ask(server, second_turn_of(first))
    assert first.usage is not None
    assert second.usage is not None
    # Whole blocks of the first turn; more than its prompt, so of the answer, too.
    assert first.usage.prompt_tokens < num_cached(second) < second.usage.prompt_tokens
    assert server.metric("causerie_prompt_tokens_reused_total") >= num_cached(second)


@pytest.mark.skipif(load_library() is None, reason="bits are equal only where the native step serves")
def test_what_is_said_depends_neither_on_the_cache_nor_on_guesses(server: ServerProcess) -> None:
    first = ask(server, FIRST)
    messages = second_turn_of(first)
    second = ask(server, messages)
    with running_server("--no-prefix-cache", "--speculative", "prompt-lookup") as other:
        other.wait_for_line("ready", START_TIMEOUT_S)
        assert ask(other, FIRST).choices[0].message.content == first.choices[0].message.content
        uncached = ask(other, messages)
    assert (num_cached(second) > 0, num_cached(uncached)) == (True, 0)
    assert uncached.choices[0].message.content == second.choices[0].message.content
