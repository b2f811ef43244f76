"""The socket that the server listens on: opened before anything slow, so that a port in use is known at once."""

from __future__ import annotations

import errno
import socket

from serving.errors import ConfigError

__all__ = ["base_url", "open_listener"]

_BACKLOG = 512


def open_listener(host: str, port: int) -> socket.socket:
    """A bound, listening TCP socket. Raises ConfigError with a cure."""
    try:
        addresses = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(f"host {host!r} has no address ({error.strerror}); use --host 127.0.0.1") from None
    family, kind, protocol, _, address = min(addresses, key=lambda found: found[0] is not socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(_explain(error, host, port)) from None
    listener.setblocking(False)
    return listener


def base_url(host: str, port: int) -> str:
    """How this machine reaches the server; a host that means every address is reached by loopback."""
    name = host.strip("[]")
    if name in ("0.0.0.0", ""):  # noqa: S104 - compared with, not bound to
        name = "127.0.0.1"
    elif name == "::":
        name = "::1"
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _explain(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use on {host}; stop what uses it, or choose another: --port {port + 1}"
    if error.errno == errno.EACCES:
        return f"port {port} needs privileges this user does not have; choose one from 1024 up: --port 8000"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine; use --host 127.0.0.1"
    return f"cannot listen on {host} port {port}: {error.strerror}"
