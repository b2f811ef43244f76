"""Is it alive, does it answer, does it move: three questions that are not the same, and the metrics."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from serving.gateway.auth import key_name_of
from serving.gateway.error_responses import json_response
from serving.gateway.fields import JsonObject
from serving.gateway.judging import rules_json
from serving.gateway.ports import Readiness, Services
from serving.metrics import CONTENT_TYPE


def live() -> Response:
    """The process runs and its event loop turns. Says nothing about the model."""
    return json_response({"status": "ok"})


def ready(request: Request, services: Services) -> Response:
    """200 when requests are answered; otherwise 503 with what it waits for and how far the preparation is."""
    readiness = services.readiness
    reason = readiness.waiting_for()
    if reason is None and readiness.model is not None:
        rules = services.rules_of_key(key_name_of(request))
        return json_response({"status": "ready", "model": readiness.model.model_id, "moderation": rules_json(rules)})
    status = "failed" if readiness.failure is not None else "waiting"
    body: JsonObject = {
        "status": status,
        "waiting_for": reason,
        "progress": _preparation(readiness),
        "error": readiness.failure,
    }
    return json_response(body, 503, {"Retry-After": str(readiness.retry_after_s)})


def _preparation(readiness: Readiness) -> JsonObject | None:
    preparation = readiness.preparation
    if preparation is None or readiness.model is not None:
        return None
    return {
        "stage": preparation.stage,
        "done": preparation.done,
        "total": preparation.total,
        "percent": preparation.percent,
    }


def progress(services: Services) -> Response:
    """503 when work is queued and no engine step has completed for `stall_after_s`."""
    seconds = services.engine.seconds_since_progress()
    limit = services.settings.stall_after_s
    is_stalled = seconds is not None and seconds > limit
    body: JsonObject = {
        "status": "stalled" if is_stalled else "idle" if seconds is None else "working",
        "seconds_since_progress": None if seconds is None else round(seconds, 3),
        "stall_after_s": limit,
    }
    return json_response(body, 503 if is_stalled else 200)


def metrics(services: Services) -> Response:
    return Response(services.metrics.render(), headers={"Content-Type": CONTENT_TYPE})
