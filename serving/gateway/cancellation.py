"""POST /v1/requests/{id}/cancel: ends an answer in flight, by its completion id or its `x-request-id`."""

from __future__ import annotations

from starlette.responses import Response

from serving.errors import UnknownRequest
from serving.gateway.error_responses import json_response
from serving.gateway.generation import Generations

_PREFIXES = ("chatcmpl-", "cmpl-")


async def cancel_request(generations: Generations, shown_id: str) -> Response:
    """The open stream ends with finish_reason "stop" after what was generated. UnknownRequest: it is not in flight."""
    request_id = shown_id
    for prefix in _PREFIXES:
        request_id = request_id.removeprefix(prefix)
    generation = generations.get(request_id)
    if generation is None:
        raise UnknownRequest(f"no request {shown_id[:100]!r} is in flight; it may have ended already", param="id")
    is_cancelled = await generation.cancel()
    return json_response({"id": shown_id, "object": "request.cancellation", "cancelled": is_cancelled})
