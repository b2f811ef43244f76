"""Reads typed, bounded values out of a request body; every refusal names the field, the value and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from serving.errors import InvalidRequest
from serving.gateway.fields import JsonObject, JsonValue

Number = TypeVar("Number", int, float)
INT64_LOW, INT64_HIGH = -(2**63), 2**63 - 1


def decode_body(body: bytes) -> JsonObject:
    """The body as a JSON object. NaN, numbers out of range, broken UTF-8 and lone surrogates are refused."""
    try:
        value: JsonValue = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {name_of(value)}")
    return value


def read_int(body: Mapping[str, JsonValue], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be an integer, not {name_of(value)}", param=name)
    return _bounded(value, name, low, high)


def read_float(body: Mapping[str, JsonValue], name: str, low: float, high: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{name} must be a number, not {name_of(value)}", param=name)
    return float(_bounded(value, name, low, high))


def read_bool(body: Mapping[str, JsonValue], name: str, default: bool = False) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false, not {name_of(value)}", param=name)
    return value


def read_required_str(body: Mapping[str, JsonValue], name: str) -> str:
    value = body.get(name)
    if value is None:
        raise InvalidRequest(f"you must provide a {name} parameter", param=name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a string, not {name_of(value)}", param=name)
    return value


def _bounded(value: Number, name: str, low: float, high: float) -> Number:
    if not low <= value <= high:  # also true for NaN
        raise InvalidRequest(f"{name} is {_shown(value)}; it must be from {_shown(low)} to {_shown(high)}", param=name)
    return value


def _shown(value: float) -> str:
    # Python refuses to print integers of thousands of digits.
    return str(value) if abs(value) < 10**30 else f"about {'-' * (value < 0)}10^{len(hex(int(abs(value)))) * 6 // 5}"


def name_of(value: JsonValue) -> str:
    """The JSON type of a value, with its article."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int():
            return "an integer"
        case float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"
