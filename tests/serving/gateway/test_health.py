"""Alive, ready, moving: three answers. And what the API says meanwhile, unknown routes, metrics."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest

from moderation.categories import Category
from serving.engine.requests import EngineStats
from serving.gateway.app import build_app
from serving.gateway.ports import Preparation, Services
from serving.metrics import Metrics
from tests.serving.gateway.fakes import ScriptedEngine, chat_body, client_of, make_services

pytestmark = pytest.mark.unit


async def get(services: Services, path: str, method: str = "GET") -> httpx.Response:
    async with client_of(build_app(replace(services, metrics=Metrics()))) as client:
        return await client.request(method, path)


async def test_ready_says_which_model_answers() -> None:
    response = await get(make_services(), "/health/ready")
    body = response.json()
    moderation = body.pop("moderation")
    assert (response.status_code, body) == (200, {"status": "ready", "model": "tiny"})
    assert (moderation["model"], moderation["input"]["mode"], moderation["output"]["mode"]) == (
        "words-1",
        "block",
        "off",
    )


async def test_ready_says_what_it_waits_for() -> None:
    services = make_services()
    services.readiness.model = None
    services.readiness.preparation = Preparation("quantize", 3.0, 30.0)
    response = await get(services, "/health/ready")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    assert response.json() == {
        "status": "waiting",
        "waiting_for": "the model is being prepared: quantize",
        "progress": {"stage": "quantize", "done": 3.0, "total": 30.0, "percent": 10.0},
        "error": None,
    }
    assert (await get(services, "/health/live")).status_code == 200


async def test_ready_says_what_failed() -> None:
    services = make_services()
    services.readiness.failure = "the model cannot be downloaded"
    response = await get(services, "/health/ready")
    assert response.status_code == 503
    assert response.json()["error"] == "the model cannot be downloaded"


async def test_ready_says_no_while_the_engine_restarts() -> None:
    engine = ScriptedEngine()
    engine.state = "restarting"
    services = make_services(engine)
    response = await get(services, "/health/ready")
    assert response.status_code == 503
    assert response.json()["waiting_for"] == "the engine is restarting"
    async with client_of(build_app(services)) as client:
        refused = await client.post("/v1/chat/completions", json=chat_body())
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_stopped")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_the_api_answers_503_with_retry_after_before_the_model_is_ready(path: str) -> None:
    services = make_services()
    services.readiness.model = None
    async with client_of(build_app(services)) as client:
        response = await client.post(path, json=chat_body())
        models = await client.get("/v1/models")
    for answer in (response, models):
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
        assert answer.json()["error"]["code"] == "unavailable"


@pytest.mark.parametrize(("seconds", "status"), [(None, 200), (29.0, 200), (31.0, 503)])
async def test_progress_is_red_when_queued_work_does_not_move(seconds: float | None, status: int) -> None:
    engine = ScriptedEngine()
    engine.stalled_for_s = seconds
    response = await get(make_services(engine), "/health/progress")
    assert response.status_code == status
    assert response.json()["seconds_since_progress"] == seconds


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/nope", "/v1/chat", "/v1/models/other", "/v1/chat/completions/"])
@pytest.mark.parametrize("has_page", [False, True])
async def test_unknown_api_paths_are_a_json_404(path: str, has_page: bool) -> None:
    app = build_app(make_services())
    if has_page:
        app.mount("/", build_app(make_services()))
    async with client_of(app) as client:
        response = await client.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/v1/chat/completions", "POST"), ("DELETE", "/v1/models/tiny", "GET"), ("PUT", "/v1/moderations", "POST")],
)
async def test_another_method_is_a_405_in_openai_s_shape(method: str, path: str, allowed: str) -> None:
    response = await get(make_services(), path, method)
    assert response.status_code == 405
    assert response.headers["allow"] == allowed
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_models_are_listed_and_shown() -> None:
    listed = (await get(make_services(), "/v1/models")).json()
    shown = (await get(make_services(), "/v1/models/tiny")).json()
    assert listed == {"object": "list", "data": [shown]}
    moderation = shown.pop("moderation")
    assert shown == {"id": "tiny", "object": "model", "created": 1_700_000_000, "owned_by": "causerie"}
    assert moderation["output"] == {
        "mode": "off",
        "fail": "closed",
        "preset": "balanced",
        "threshold": None,
        "category_thresholds": {},
    }
    assert moderation["trained_categories"] == ["hate"]
    assert sorted([*moderation["untrained_categories"], "hate"]) == sorted(Category)
    assert moderation["extensions"] == ["jailbreak"]


async def test_a_bug_is_a_500_in_openai_s_shape_with_the_id_that_the_log_has() -> None:
    class Broken(ScriptedEngine):
        def seconds_since_progress(self) -> float | None:
            raise RuntimeError("secret detail")

    response = await get(make_services(Broken()), "/health/progress")
    assert response.status_code == 500
    message = response.json()["error"]["message"]
    assert response.headers["x-request-id"] in message
    assert "secret" not in message


async def test_metrics_show_requests_tokens_and_the_engine() -> None:
    engine = ScriptedEngine()
    engine.stats = EngineStats(
        num_running=1,
        num_waiting=2,
        num_free_blocks=30,
        num_total_blocks=100,
        num_steps=7,
        num_prompt_tokens=0,
        num_generated_tokens=0,
    )
    services = make_services(engine)
    services.metrics.observe_freed(0.003)
    async with client_of(build_app(services)) as client:
        await client.post("/v1/chat/completions", json=chat_body())
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    for line in (
        'causerie_requests_total{endpoint="chat",status="200"} 1.0',
        "causerie_prompt_tokens_total 8.0",
        "causerie_generated_tokens_total 6.0",
        "causerie_time_to_first_token_seconds_count 1.0",
        "causerie_inter_token_seconds_count 1.0",
        "causerie_sequences_running 1.0",
        "causerie_sequences_waiting 2.0",
        "causerie_kv_blocks_used 70.0",
        "causerie_kv_blocks_total 100.0",
        "causerie_engine_steps_total 7.0",
        'causerie_flagged_total{direction="input"} 0.0',
        'causerie_flagged_total{direction="output"} 0.0',
        'causerie_moderation_failures_total{direction="output"} 0.0',
        'causerie_moderation_seconds_count{direction="input"} 1.0',
        "causerie_cancel_to_freed_seconds_count 1.0",
    ):
        assert line in lines


async def test_two_apps_do_not_share_metrics() -> None:
    first, second = make_services(), make_services()
    async with client_of(build_app(first)) as client:
        await client.post("/v1/chat/completions", json=chat_body())
    assert second.metrics.registry.get_sample_value("causerie_prompt_tokens_total") == 0
