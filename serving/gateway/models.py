"""GET /v1/models and /v1/models/{id}: the one model that this server answers with."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from serving.gateway.answering import check_model_name
from serving.gateway.auth import key_name_of
from serving.gateway.error_responses import json_response
from serving.gateway.fields import JsonObject
from serving.gateway.judging import rules_json
from serving.gateway.ports import ModerationRules, ServedModel, Services


def list_models(request: Request, services: Services) -> Response:
    model = services.readiness.require_model()
    return json_response({"object": "list", "data": [_model_json(model, _rules(request, services))]})


def get_model(request: Request, services: Services, model_id: str) -> Response:
    model = services.readiness.require_model()
    check_model_name(model, model_id)
    return json_response(_model_json(model, _rules(request, services)))


def _rules(request: Request, services: Services) -> ModerationRules:
    return services.rules_of_key(key_name_of(request))


def _model_json(model: ServedModel, rules: ModerationRules) -> JsonObject:
    """OpenAI's object, and beside it how this model is moderated for who asks."""
    return {
        "id": model.model_id,
        "object": "model",
        "created": model.created,
        "owned_by": "causerie",
        "moderation": rules_json(rules),
    }
