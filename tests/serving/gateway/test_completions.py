"""POST /v1/completions: prompts as text and ids, several at once, echo with scores."""

from __future__ import annotations

import httpx
import pytest

from serving.engine.requests import EngineRequest, GenerateRequest, ScoreRequest
from tests.serving.gateway.fakes import ScriptedEngine, Step, client_for, say

pytestmark = pytest.mark.unit


async def post(engine: ScriptedEngine | None = None, **fields: object) -> httpx.Response:
    async with client_for(engine) as client:
        return await client.post("/v1/completions", json={"model": "tiny", "prompt": "Hi", **fields})


async def test_answer_has_the_shape_of_a_text_completion() -> None:
    engine = ScriptedEngine()
    response = await post(engine)
    body = response.json()
    assert body["object"] == "text_completion"
    assert body["id"] == f"cmpl-{response.headers['x-request-id']}"
    assert body["choices"] == [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 6,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert engine.generated.sampling.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[97, 98]]),
        (["a", "b"], [[97], [98]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
async def test_prompts_come_as_text_or_ids_one_or_several(prompt: object, expected: list[list[int]]) -> None:
    engine = ScriptedEngine()
    assert (await post(engine, prompt=prompt)).status_code == 200
    assert [request.prompt_ids for request in engine.requests if isinstance(request, GenerateRequest)] == expected


async def test_choices_are_counted_over_all_prompts() -> None:
    def script(request: EngineRequest) -> list[Step]:
        assert isinstance(request, GenerateRequest)
        return say(request, bytes(request.prompt_ids).decode().upper())

    response = await post(ScriptedEngine(script), prompt=["a", "b"], n=2)
    choices = response.json()["choices"]
    assert [(one["index"], one["text"]) for one in choices] == [(0, "A"), (1, "A"), (2, "B"), (3, "B")]
    assert response.json()["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize("prompt", ["", [""], [257], [-1], [10**30]])
async def test_a_prompt_without_tokens_of_the_vocabulary_is_a_400(prompt: object) -> None:
    response = await post(prompt=prompt)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


async def test_too_long_a_prompt_names_the_prompt() -> None:
    response = await post(prompt="x" * 1000)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"
    assert response.json()["error"]["code"] == "context_length_exceeded"


async def test_echo_comes_before_the_text() -> None:
    assert (await post(echo=True)).json()["choices"][0]["text"] == "HiHello"


async def test_echo_with_logprobs_scores_the_prompt() -> None:
    engine = ScriptedEngine(lambda request: say(request, "!é"))
    body = (await post(engine, echo=True, logprobs=1)).json()
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["H", "i", "!", "�", "�"]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]
    assert logprobs["top_logprobs"][:2] == [None, {"i": -0.5, "z": -9999.0}]
    assert logprobs["text_offset"][:3] == [0, 1, 2]
    assert [type(request) for request in engine.requests] == [ScoreRequest, GenerateRequest]


async def test_echo_of_nothing_more_is_a_pure_score() -> None:
    engine = ScriptedEngine()
    body = (await post(engine, prompt=["abc", "d"], echo=True, logprobs=0, max_tokens=0)).json()
    first, second = body["choices"]
    assert (first["text"], first["finish_reason"]) == ("abc", "length")
    assert first["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert second["logprobs"]["token_logprobs"] == [None]
    assert body["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 0,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert [type(request) for request in engine.requests] == [ScoreRequest]


async def test_streamed_logprobs_count_their_offsets_on() -> None:
    engine = ScriptedEngine(lambda request: say(request, "ab", "c"))
    response = await post(engine, logprobs=0, stream=True)
    assert response.status_code == 200
    assert '"text_offset":[0,1,2]' in response.text


async def test_prompts_are_judged() -> None:
    engine = ScriptedEngine()
    response = await post(engine, prompt=["fine", "bomb"])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"
    assert response.json()["error"]["code"] == "content_filter"
    ids = await post(engine, prompt=list(b"bomb"))
    assert ids.status_code == 400
    assert engine.requests == []
