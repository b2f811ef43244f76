"""From what a person wrote (TOML value, environment text, flag text) to a checked value of one setting.

Each reader takes the raw value and returns the value, or raises ValueError with what is allowed. Used by
`serving.config` only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TypeVar, cast

__all__ = [
    "boolean",
    "choice",
    "integer",
    "names",
    "number",
    "numbers_by_name",
    "optional",
    "path",
    "read_size",
    "share",
    "size",
    "text",
]

T = TypeVar("T")
Reader = Callable[[object], T]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)")
_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000 ** (i + 1) for i, letter in enumerate("kmgt")},
    **{f"{letter}ib": 1024 ** (i + 1) for i, letter in enumerate("kmgt")},
}
_TRUE = ("true", "1", "yes", "on")
_FALSE = ("false", "0", "no", "off")


def text(raw: object) -> str:
    if isinstance(raw, str) and raw.strip():
        return raw.strip()
    raise ValueError("a text that is not empty")


def boolean(raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and raw.lower() in _TRUE + _FALSE:
        return raw.lower() in _TRUE
    raise ValueError("true or false")


def integer(low: int, high: int | None = None) -> Reader[int]:
    allowed = f"a whole number from {low:,}" + (f" to {high:,}" if high is not None else " up")

    def read(raw: object) -> int:
        value = _as_int(raw)
        if value is None or value < low or (high is not None and value > high):
            raise ValueError(allowed)
        return value

    return read


def number(low: float, high: float, *, ends_allowed: bool = True) -> Reader[float]:
    allowed = f"a number from {low:g} to {high:g}" if ends_allowed else f"a number between {low:g} and {high:g}"

    def read(raw: object) -> float:
        value = _as_float(raw)
        if value is None or not low <= value <= high or (not ends_allowed and value in (low, high)):
            raise ValueError(allowed)
        return value

    return read


def share(raw: object) -> float:
    """Of a whole: a number from 0 to 1, or a percentage with its sign."""
    is_percentage = isinstance(raw, str) and raw.strip().endswith("%")
    value = _as_float(raw.strip().removesuffix("%")) if isinstance(raw, str) else _as_float(raw)
    if value is not None and is_percentage:
        value /= 100
    if value is None or not 0 <= value <= 1:
        raise ValueError("a share from 0 to 1, or a percentage such as 95%")
    return value


def size(low: int) -> Reader[int]:
    """Bytes, as a number or with a unit: 536870912, 512MiB, 0.5GiB, 512MB."""

    def read(raw: object) -> int:
        value = read_size(raw)
        if value is None or value < low:
            raise ValueError(f"a size of at least {low:,} bytes, such as 512MiB or 2GiB")
        return value

    return read


def choice(*allowed: str) -> Reader[str]:
    def read(raw: object) -> str:
        if isinstance(raw, str) and raw.lower() in allowed:
            return raw.lower()
        raise ValueError("one of " + ", ".join(allowed))

    return read


def member(kind: type[StrEnum]) -> Reader[StrEnum]:
    read_name = choice(*(str(value) for value in kind))
    return lambda raw: kind(read_name(raw))


def names(raw: object) -> tuple[str, ...]:
    """A TOML list, or one text with commas."""
    if isinstance(raw, str):
        return tuple(part.strip() for part in raw.split(",") if part.strip())
    if isinstance(raw, Sequence) and all(isinstance(part, str) and part.strip() for part in raw):
        return tuple(str(part).strip() for part in raw)
    raise ValueError("a list of texts (in TOML), or texts separated by commas")


def numbers_by_name(allowed: Sequence[str], low: float, high: float) -> Reader[Mapping[str, float]]:
    """A TOML table, or one text such as hate=0.5,violence=0.8."""
    read_number = number(low, high, ends_allowed=False)

    def read(raw: object) -> Mapping[str, float]:
        pairs = _pairs(raw)
        if pairs is None or len(pairs) != len(dict(pairs)):
            raise ValueError("a table of numbers (in TOML), or name=number texts separated by commas")
        if any(name not in allowed for name, _ in pairs):
            raise ValueError("numbers by names out of " + ", ".join(allowed))
        try:
            return {name: read_number(value) for name, value in pairs}
        except ValueError as error:
            raise ValueError(f"by every name {error}") from None

    return read


def _pairs(raw: object) -> list[tuple[str, object]] | None:
    if isinstance(raw, Mapping):
        return [(str(name), value) for name, value in cast("Mapping[object, object]", raw).items()]
    if not isinstance(raw, str):
        return None
    parts = [part.partition("=") for part in raw.split(",") if part.strip()]
    return [(name.strip(), value) for name, _, value in parts] if all(equals for _, equals, _ in parts) else None


def path(raw: object) -> Path:
    if isinstance(raw, Path):
        return raw
    return Path(text(raw)).expanduser()


def optional(read: Reader[T]) -> Reader[T | None]:
    """Absent stays absent: None has no spelling, one leaves the setting out."""
    return lambda raw: None if raw is None else read(raw)


def read_size(raw: object) -> int | None:
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    match = _SIZE.fullmatch(raw.strip()) if isinstance(raw, str) else None
    if match is None or match[2].lower() not in _UNITS:
        return None
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _as_int(raw: object) -> int | None:
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and re.fullmatch(r"[+-]?\d[\d_]*", raw.strip()):
        return int(raw)
    return None


def _as_float(raw: object) -> float | None:
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        return None
    try:
        value = float(raw)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
