"""How this product starts a Python process of its own: our packages from where we found them, no secret, no shadowing.

Used for the engine process and for the preparation of a model.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

__all__ = ["child_environment", "python_command"]

_SECRETS = ("CAUSERIE_API_KEY",)


def python_command(module: str, *arguments: str) -> list[str]:
    """`-P` keeps the current directory off the import path: a folder named `quant` there must not shadow ours."""
    return [sys.executable, "-P", "-m", module, *arguments]


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Ours without secrets; from a checkout that is not installed, with its root on the import path."""
    kept = {name: value for name, value in environ.items() if name not in _SECRETS}
    root = str(Path(__file__).resolve().parents[1])
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        kept["PYTHONPATH"] = os.pathsep.join(part for part in (root, environ.get("PYTHONPATH")) if part)
    return kept
