"""Builds the HTTP application: every route on one page, and the checks that each request passes before one.

`serving.serve` calls `build_app` with the composed services and mounts the chat page on what it gets.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from serving.errors import ServiceError
from serving.gateway import health, models
from serving.gateway.auth import AccessCheck, AccessMiddleware, HostCheck, KeyCheck, OriginCheck
from serving.gateway.cancellation import cancel_request
from serving.gateway.chat import create_chat_completion
from serving.gateway.completions import create_completion
from serving.gateway.disconnect import ClientGoneError
from serving.gateway.error_responses import on_client_gone, on_http_exception, on_service_error
from serving.gateway.generation import Generations
from serving.gateway.limits import BodyMiddleware
from serving.gateway.moderations import create_moderation
from serving.gateway.ports import GatewaySettings, Services
from serving.gateway.request_context import RequestContextMiddleware

_ALL_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def build_app(services: Services) -> FastAPI:
    """One app per `services`; its metrics start to show the engine's gauges."""
    services.metrics.watch_engine(lambda: services.engine.stats)
    app = FastAPI(
        title="Causerie",
        docs_url=None,  # the stock pages load scripts from elsewhere
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        middleware=_middleware(services),
        exception_handlers={
            ServiceError: on_service_error,
            HTTPException: on_http_exception,
            ClientGoneError: on_client_gone,
        },
    )
    _add_api_routes(app, services)
    _add_health_routes(app, services)
    _add_unknown_api_route(app)
    return app


def _middleware(services: Services) -> list[Middleware]:
    """Outermost first: id and count, then who gets in, then what may come in."""
    settings = services.settings
    return [
        Middleware(RequestContextMiddleware, metrics=services.metrics),
        *_cors(settings),
        Middleware(AccessMiddleware, checks=_access_checks(settings)),
        Middleware(BodyMiddleware, max_body_bytes=settings.limits.max_body_bytes),
    ]


def _access_checks(settings: GatewaySettings) -> list[AccessCheck]:
    checks: list[AccessCheck] = [HostCheck(settings.allowed_hosts), OriginCheck(settings.allowed_origins)]
    return [*checks, KeyCheck(settings.api_key)] if settings.api_key else checks


def _cors(settings: GatewaySettings) -> list[Middleware]:
    """Only pages of the named origins may read answers from a browser."""
    if not settings.allowed_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    ]


def _add_api_routes(app: FastAPI, services: Services) -> None:
    generations = Generations(services.engine, services.metrics)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await create_chat_completion(request, services, generations)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await create_completion(request, services, generations)

    @app.post("/v1/moderations")
    async def moderations(request: Request) -> Response:
        return await create_moderation(request, services)

    @app.get("/v1/models")
    async def list_models(request: Request) -> Response:
        return models.list_models(request, services)

    @app.get("/v1/models/{model_id:path}")
    async def get_model(request: Request, model_id: str) -> Response:
        return models.get_model(request, services, model_id)

    @app.post("/v1/requests/{request_id}/cancel")
    async def cancel(request_id: str) -> Response:
        return await cancel_request(generations, request_id)


def _add_health_routes(app: FastAPI, services: Services) -> None:
    @app.get("/health/live")
    async def live() -> Response:
        return health.live()

    @app.get("/health/ready")
    async def ready(request: Request) -> Response:
        return health.ready(request, services)

    @app.get("/health/progress")
    async def progress() -> Response:
        return health.progress(services)

    @app.get("/metrics")
    async def metrics() -> Response:
        return health.metrics(services)


def _add_unknown_api_route(app: FastAPI) -> None:
    """Without it the page that is mounted at `/` would answer unknown API paths in HTML."""
    known = list(app.router.routes)

    @app.api_route("/v1/{path:path}", methods=_ALL_METHODS)
    @app.api_route("/v1", methods=_ALL_METHODS)
    async def unknown(request: Request) -> Response:
        allowed: set[str] = set()
        for route in known:
            if route.matches(request.scope)[0] is Match.PARTIAL:
                allowed |= getattr(route, "methods", None) or set()
        if allowed:
            raise HTTPException(405, headers={"Allow": ", ".join(sorted(allowed))})
        raise HTTPException(404)
