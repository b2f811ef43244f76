"""What can be seen to be wrong before anything is downloaded, each with a one-line cure.

Every check looks at one thing and returns a Problem or None; `serve` and `run_checks` decide which ones apply.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

OLDEST_PYTHON = (3, 11)
PROXY_TIMEOUT_S = 3.0
PROXY_VARIABLES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@dataclass(frozen=True, slots=True)
class Problem:
    what: str
    cure: str

    def __str__(self) -> str:
        return f"{self.what}\n    Cure: {self.cure}"


class SetupError(Exception):
    """Set-up cannot go on; carries what the user reads."""

    def __init__(self, what: str, cure: str) -> None:
        super().__init__(what)
        self.problem = Problem(what, cure)


def check_python(version: tuple[int, int], has_module: Callable[[str], bool]) -> Problem | None:
    """Debian ships Python without ensurepip, so a `venv` that imports may still be unable to make one."""
    found = f"{version[0]}.{version[1]}"
    if version < OLDEST_PYTHON:
        return Problem(
            f"Python {found} is too old; 3.11 or newer is needed",
            "install a newer one and name it: PYTHON=/path/to/python3",
        )
    missing = [name for name in ("venv", "ensurepip") if not has_module(name)]
    if missing:
        return Problem(
            f"this Python {found} cannot make virtual environments (no {' and no '.join(missing)} module)",
            f"apt install python{found}-venv (Debian, Ubuntu), or use a Python from python.org",
        )
    return None


def check_disk(folder: Path, needed_mb: int, free_mb: int) -> Problem | None:
    if free_mb >= needed_mb:
        return None
    return Problem(
        f"{folder} has {free_mb:,} MB free; about {needed_mb:,} MB are needed",
        "free some space there, or move the checkout to a larger disk",
    )


def check_port(host: str, port: int) -> Problem | None:
    """Binds as the server will. Any failure but a taken or forbidden port is left to the server to explain."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            return Problem(f"port {port} needs more rights than this user has", "choose one above 1023: --port 8000")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return None
            return Problem(
                f"port {port} on {host} is in use, perhaps by another Causerie",
                f"stop that program, or choose another port: --port {port + 1 if port < 65535 else 8000}",
            )
    return None


def check_writable(folder: Path, cure: str) -> Problem | None:
    """`folder` may not exist yet: then its nearest existing parent has to take it."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        return None
    return Problem(f"cannot write to {nearest}, where {folder} should be", cure)


def check_proxy(environment: Mapping[str, str], connect: Callable[[str, int], None] | None = None) -> Problem | None:
    """A proxy that is set must answer. Without one, pip itself finds out whether the network is open."""
    name = next((name for name in PROXY_VARIABLES if environment.get(name)), None)
    if name is None:
        return None
    value = environment[name]
    address = urlsplit(value if "//" in value else f"//{value}")
    shown = address.hostname or "?"  # never the whole value: it may carry a password
    cure = f"correct {name} (form: http://host:port), or unset it"
    try:
        port = address.port or {"https": 443, "socks5": 1080}.get(address.scheme, 80)
    except ValueError:
        return Problem(f"{name} has no valid port", cure)
    if address.hostname is None:
        return Problem(f"{name} names no host", cure)
    try:
        (connect or _connect)(address.hostname, port)
    except OSError as error:
        return Problem(f"the proxy {shown}:{port} of {name} does not answer ({error.strerror or error})", cure)
    return None


def _connect(host: str, port: int) -> None:
    socket.create_connection((host, port), timeout=PROXY_TIMEOUT_S).close()
