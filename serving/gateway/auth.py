"""Who gets in: the Host header, the Origin of the page that asks, and the API key, in that order.

Pure ASGI middleware around every route, the mounted page and its web sockets included; only `/health/live` is open.
The Host check stops DNS rebinding, the Origin check stops a web page elsewhere from driving a server on this machine.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.errors import Forbidden, NotAuthorized, ServiceError
from serving.gateway.error_responses import error_response

OPEN_PATH = "/health/live"
# The name of the one key there can be. With several keys, `KeyCheck` would know the name of each.
API_KEY_NAME = "default"
_KEY_NAME_IN_SCOPE = "causerie.key_name"
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")

AccessCheck = Callable[[Scope, Headers], ServiceError | None]


class AccessMiddleware:
    """Runs the checks in order; the first refusal is the answer."""

    def __init__(self, app: ASGIApp, *, checks: Sequence[AccessCheck]) -> None:
        self.app = app
        self.checks = tuple(checks)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"] == OPEN_PATH:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        for check in self.checks:
            refusal = check(scope, headers)
            if refusal is not None:
                await _refuse(refusal, scope, receive, send)
                return
        await self.app(scope, receive, send)


async def _refuse(refusal: ServiceError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": refusal.message})
        return
    # A browser asks its user for the key (any name, the key as password) when it opens the page.
    scheme = "Bearer" if scope["path"].startswith("/v1") else 'Basic realm="causerie", charset="UTF-8"'
    headers = {"WWW-Authenticate": scheme} if isinstance(refusal, NotAuthorized) else None
    await error_response(refusal, headers)(scope, receive, send)


class HostCheck:
    def __init__(self, allowed_hosts: Sequence[str]) -> None:
        allowed = [_without_port(host.lower()) for host in (*LOOPBACK_HOSTS, *allowed_hosts)]
        self.accepts_any = "*" in allowed
        self.exact = frozenset(host for host in allowed if not host.startswith("*"))
        self.suffixes = tuple(host[1:] for host in allowed if host.startswith("*."))

    def __call__(self, _scope: Scope, headers: Headers) -> ServiceError | None:
        hosts = headers.getlist("host")
        if self.accepts_any:
            return None
        if len(hosts) != 1:
            return Forbidden("exactly one Host header is required")
        host = _without_port(hosts[0].lower())
        if host in self.exact or host.endswith(self.suffixes or ("\0",)):
            return None
        return Forbidden(f"Host {hosts[0][:100]!r} is not allowed; add it to allowed_hosts if it is this server's name")


class OriginCheck:
    """A request without Origin does not come from another site's script; one with it must be ours or allowed."""

    def __init__(self, allowed_origins: Sequence[str]) -> None:
        self.allowed = frozenset(origin.rstrip("/").lower() for origin in allowed_origins)

    def __call__(self, _scope: Scope, headers: Headers) -> ServiceError | None:
        origins = headers.getlist("origin")
        if not origins or "*" in self.allowed:
            return None
        origin = origins[0].lower()
        own = headers.get("host", "").lower()
        # The scheme is not compared: behind a TLS proxy ours is http while the page's is https.
        if len(origins) == 1 and own and (origin in self.allowed or origin in (f"http://{own}", f"https://{own}")):
            return None
        return Forbidden(f"Origin {origins[0][:100]!r} is not allowed; add it to allowed_origins if it is yours")


class KeyCheck:
    """`Authorization: Bearer KEY`, or Basic with the key as password. Compared in constant time."""

    def __init__(self, api_key: str) -> None:
        self._digest = _digest(api_key.encode())

    def __call__(self, scope: Scope, headers: Headers) -> ServiceError | None:
        presented = _presented_key(headers.get("authorization", ""))
        if presented is None:
            return NotAuthorized("no API key was sent; send it as 'Authorization: Bearer KEY'")
        if not hmac.compare_digest(_digest(presented), self._digest):
            return NotAuthorized("the API key is not correct")
        scope[_KEY_NAME_IN_SCOPE] = API_KEY_NAME
        return None


def key_name_of(request: Request) -> str | None:
    """The name of the API key that let the request in; None where none is needed."""
    return request.scope.get(_KEY_NAME_IN_SCOPE)


def _digest(key: bytes) -> bytes:
    # Of equal length whatever was sent, so the comparison tells nothing about the key's length.
    return hashlib.sha256(key).digest()


def _presented_key(authorization: str) -> bytes | None:
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return None


def _without_port(host: str) -> str:
    """`[::1]:8000` and `example.org:80` without their ports; a bare IPv6 address in brackets. Broken ones: ""."""
    if host.startswith("["):
        address, bracket, _ = host.partition("]")
        return address + "]" if bracket else ""
    if host.count(":") > 1:
        return f"[{host}]"
    return host.partition(":")[0]
