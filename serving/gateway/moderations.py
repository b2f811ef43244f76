"""POST /v1/moderations in OpenAI's response shape. Answers before the chat model is ready: it needs the policy only."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from moderation.policy import Verdict
from serving.errors import UnknownModel
from serving.gateway.auth import key_name_of
from serving.gateway.error_responses import json_response
from serving.gateway.fields import JsonObject, JsonValue
from serving.gateway.json_reader import decode_body
from serving.gateway.judging import judge_alone
from serving.gateway.ports import ModerationPort, Services
from serving.gateway.request_context import context_of
from serving.gateway.schemas import ModerationRequest, parse_moderation

# Clients send OpenAI's names without meaning a particular model; there is one here.
_OPENAI_NAMES = ("omni-moderation-latest", "text-moderation-latest", "text-moderation-stable")


async def create_moderation(request: Request, services: Services) -> Response:
    asked = parse_moderation(decode_body(await request.body()), services.settings.limits)
    policy = services.rules_of_key(key_name_of(request)).policy
    model_id = policy.model_id
    if asked.model is not None and asked.model not in (model_id, *_OPENAI_NAMES):
        message = f"the model {asked.model[:100]!r} does not exist; this server moderates with {model_id!r}"
        raise UnknownModel(message, param="model")
    verdicts = await judge_alone(partial(_judge, policy, asked))
    results: list[JsonValue] = [_result(verdict) for verdict in verdicts]
    answer_id = f"modr-{context_of(request).request_id}"
    return json_response({"id": answer_id, "model": model_id, "results": results})


def _judge(policy: ModerationPort, asked: ModerationRequest) -> list[Verdict]:
    return policy.judge_texts(asked.texts) if asked.turns is None else [policy.judge_input(asked.turns)]


def _result(verdict: Verdict) -> JsonObject:
    """OpenAI's shape, whole, and what it has no place for in an object of its own."""
    return {
        "flagged": verdict.flagged,
        "categories": dict(verdict.categories),
        "category_scores": dict(verdict.category_scores),
        "category_applied_input_types": {category: ["text"] for category in verdict.categories},
        "causerie": {
            "probability": verdict.probability,
            "threshold": verdict.threshold,
            "reason": verdict.reason,
            "language": verdict.language,
            "extension_scores": dict(verdict.extension_scores),
        },
    }
