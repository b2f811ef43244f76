"""Reading a weights directory: configuration, tensors and other files, each checked against what was written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from moderation.errors import ModerationError, WeightsError

__all__ = [
    "CONFIG_FILE",
    "CURE",
    "TENSORS_FILE",
    "Tensors",
    "read_checked",
    "read_config",
    "read_format",
    "read_tensors",
]

CONFIG_FILE = "config.json"
TENSORS_FILE = "weights.safetensors"
CURE = "reinstall causerie, or write new weights with `causerie train moderation`"

Tensors = Mapping[str, npt.NDArray[np.generic]]
Config = TypeVar("Config")


def read_config(path: Path, kind: type[Config], form: str) -> Config:
    """Reads a config.json with its types checked; its `format` must be `form`. Raises WeightsError."""
    found = read_format(path)
    if found != form:
        raise WeightsError(path, f"format {found!r}, expected {form!r}", CURE)
    return _decode(path, kind)


def read_format(path: Path) -> str:
    """What a config.json says it is. Raises WeightsError."""
    return _decode(path, _Format).format


def _decode(path: Path, kind: type[Config]) -> Config:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise WeightsError(path, "the file is missing", CURE) from None
    except (OSError, msgspec.MsgspecError, ModerationError) as error:
        raise WeightsError(path, f"not a classifier configuration ({error})", CURE) from None


class _Format(msgspec.Struct):
    format: str


def read_checked(path: Path, sha256: str) -> bytes:
    """The file's bytes, whose hash must be `sha256`. Raises WeightsError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WeightsError(path, f"cannot be read ({error.strerror})", CURE) from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise WeightsError(path, f"sha256 {digest[:12]}, expected {sha256[:12]}", CURE)
    return content


def read_tensors(path: Path, sha256: str) -> Tensors:
    """The tensors of a safetensors file whose hash must be `sha256`. Raises WeightsError."""
    try:
        return load_safetensors(read_checked(path, sha256))
    except SafetensorError as error:
        raise WeightsError(path, f"not a safetensors file ({error})", CURE) from None
