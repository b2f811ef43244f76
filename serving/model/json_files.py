"""Reading the JSON objects of a model directory; every failure is a CheckpointError that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from quant.errors import CheckpointError


def read_object(path: Path) -> dict[str, object]:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; a model directory in Hugging Face's layout has one")
    return parse_object(path.read_text(encoding="utf-8"), str(path))


def read_optional_object(path: Path) -> dict[str, object]:
    """Empty if there is no such file."""
    return read_object(path) if path.exists() else {}


def parse_object(source: str, origin: str) -> dict[str, object]:
    try:
        content = json.loads(source)
    except ValueError as error:
        raise CheckpointError(f"{origin} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{origin} must hold a JSON object")
    return cast("dict[str, object]", content)
