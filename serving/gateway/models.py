"""GET /v1/models and /v1/models/{id}: the one model that this server answers with."""

from __future__ import annotations

from starlette.responses import Response

from serving.gateway.answering import check_model_name
from serving.gateway.error_responses import json_response
from serving.gateway.fields import JsonObject
from serving.gateway.ports import ServedModel, Services


def list_models(services: Services) -> Response:
    model = services.readiness.require_model()
    return json_response({"object": "list", "data": [_model_json(model)]})


def get_model(services: Services, model_id: str) -> Response:
    model = services.readiness.require_model()
    check_model_name(model, model_id)
    return json_response(_model_json(model))


def _model_json(model: ServedModel) -> JsonObject:
    return {"id": model.model_id, "object": "model", "created": model.created, "owned_by": "causerie"}
