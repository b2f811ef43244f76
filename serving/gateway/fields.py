"""The one table of what a request body may contain. A field is implemented, a hint, or accepted only at its default.

Everything else is refused by name: a client must never believe that a parameter worked when it did not. The tables in
`docs/api.md` are this module's output (`python -m serving.gateway.fields`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

import msgspec

from serving.errors import InvalidRequest

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"
JsonObject: TypeAlias = dict[str, JsonValue]


class Treatment(StrEnum):
    IMPLEMENTED = "implemented"
    HINT = "hint"  # cannot change the text: checked for its type, then unused
    DEFAULT_ONLY = "default only"  # null or one of `allowed`, which all ask for what happens anyway


class HintKind(StrEnum):
    STRING = "string"
    STRING_MAP = "object of strings"


@dataclass(frozen=True, slots=True)
class Field:
    name: str
    treatment: Treatment
    accepts: str  # for the documentation
    allowed: tuple[JsonValue, ...] = ()
    hint_kind: HintKind = HintKind.STRING


def implemented(name: str, accepts: str) -> Field:
    return Field(name, Treatment.IMPLEMENTED, accepts)


def hint(name: str, kind: HintKind = HintKind.STRING) -> Field:
    return Field(name, Treatment.HINT, f"{kind.value}; no effect", hint_kind=kind)


def default_only(name: str, *allowed: JsonValue) -> Field:
    shown = ", ".join(f"`{_as_json(value)}`" for value in (None, *allowed))
    return Field(name, Treatment.DEFAULT_ONLY, shown, allowed=allowed)


def _as_json(value: JsonValue) -> str:
    return msgspec.json.encode(value).decode()


_SAMPLING = (
    implemented("temperature", "number 0 to 2; 0 is greedy. Absent: the model's generation_config.json, then 1"),
    implemented("top_p", "number 0 to 1. Absent: generation_config.json, then 1"),
    implemented("top_k", "integer; 0 or -1 is off (extension). Absent: generation_config.json, then off"),
    implemented("presence_penalty", "number -2 to 2, default 0"),
    implemented("frequency_penalty", "number -2 to 2, default 0"),
    implemented("repetition_penalty", "number 0.01 to 10 (extension). Absent: generation_config.json, then 1"),
    implemented("seed", "64-bit integer; the same seed and request give the same text"),
    implemented("stop", "string or list of strings; at most 4"),
    implemented("ignore_eos", "boolean (extension): go on after the end-of-turn token"),
    implemented("n", "integer, at least 1"),
)

_STREAMING = (
    implemented("stream", "boolean"),
    implemented("stream_options", "object, only with `stream`; see below"),
)

_HINTS = (
    hint("user"),
    hint("safety_identifier"),
    hint("prompt_cache_key"),
    hint("metadata", HintKind.STRING_MAP),
    default_only("service_tier", "auto", "default"),
    default_only("store", False),
)

CHAT_FIELDS = (
    implemented("model", "string, required: the id that `GET /v1/models` lists"),
    implemented("messages", "list of messages, required; see below"),
    *_STREAMING,
    *_SAMPLING,
    implemented("max_completion_tokens", "integer, at least 1. Absent: what is left of the context"),
    implemented("max_tokens", "the older name of `max_completion_tokens`"),
    implemented("logprobs", "boolean"),
    implemented("top_logprobs", "integer 0 to 20, only with `logprobs`"),
    *_HINTS,
    default_only("audio"),
    default_only("function_call", "none"),
    default_only("functions", []),
    default_only("logit_bias", {}),
    default_only("modalities", ["text"]),
    default_only("moderation"),
    default_only("parallel_tool_calls", True),
    default_only("prediction"),
    default_only("prompt_cache_options"),
    default_only("prompt_cache_retention"),
    default_only("reasoning_effort"),
    default_only("response_format", {"type": "text"}),
    default_only("tool_choice", "none", "auto"),
    default_only("tools", []),
    default_only("verbosity", "medium"),
    default_only("web_search_options"),
)

COMPLETION_FIELDS = (
    implemented("model", "string, required: the id that `GET /v1/models` lists"),
    implemented("prompt", "string, list of strings, list of token ids or list of lists of token ids, required"),
    *_STREAMING,
    *_SAMPLING,
    implemented("max_tokens", "integer; default 16. 0 only with `echo`"),
    implemented("logprobs", "integer 0 to 5"),
    implemented("echo", "boolean; together with `logprobs` only without `stream`"),
    *_HINTS,
    default_only("best_of", 1),
    default_only("logit_bias", {}),
    default_only("suffix", ""),
)

MODERATION_FIELDS = (
    implemented("input", "string, list of strings, list of text parts, or list of messages (extension); required"),
    implemented("model", "string: this server's moderation model, or one of OpenAI's `…-moderation-latest` names"),
)

MESSAGE_FIELDS = (
    implemented("role", "`system`, `developer` (read as system), `user`, `assistant` or `tool`; required"),
    implemented("content", 'string or list of `{"type": "text", "text": …}` parts; required'),
    hint("tool_call_id"),
    default_only("annotations", []),
    default_only("audio"),
    default_only("function_call"),
    default_only("name"),
    default_only("refusal"),
    default_only("tool_calls", []),
)

STREAM_OPTION_FIELDS = (
    implemented("include_usage", "boolean: a last chunk with `usage` and no choices"),
    default_only("include_obfuscation", False),
)

TABLES: Mapping[str, tuple[Field, ...]] = {
    "POST /v1/chat/completions": CHAT_FIELDS,
    "messages[…]": MESSAGE_FIELDS,
    "stream_options": STREAM_OPTION_FIELDS,
    "POST /v1/completions": COMPLETION_FIELDS,
    "POST /v1/moderations": MODERATION_FIELDS,
}


def check_fields(body: Mapping[str, JsonValue], fields: tuple[Field, ...], *, path: str = "") -> None:
    """Raises InvalidRequest naming the first field that is unknown or asks for what is not implemented."""
    table = {field.name: field for field in fields}
    for name, value in body.items():
        field = table.get(name)
        if field is None:
            raise InvalidRequest(f"Unrecognized request argument supplied: {path}{name}", param=f"{path}{name}")
        if value is not None:
            _check_value(field, value, f"{path}{name}")


def _check_value(field: Field, value: JsonValue, param: str) -> None:
    if field.treatment is Treatment.DEFAULT_ONLY and not any(is_same_json(value, one) for one in field.allowed):
        raise InvalidRequest(
            f"{param} is not supported by this server; leave it out or send {field.accepts}", param=param
        )
    if field.treatment is Treatment.HINT and not _is_hint(value, field.hint_kind):
        raise InvalidRequest(
            f"{param} must be a{'n' * (field.hint_kind != HintKind.STRING)} {field.hint_kind.value}", param=param
        )


def _is_hint(value: JsonValue, kind: HintKind) -> bool:
    if kind is HintKind.STRING:
        return isinstance(value, str)
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def is_same_json(left: JsonValue, right: JsonValue) -> bool:
    """Equality as JSON has it: `true` is not 1."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    return left == right


def render_tables() -> str:
    """The tables of `docs/api.md`."""
    return "\n".join(_render_table(title, fields) for title, fields in TABLES.items())


def _render_table(title: str, fields: tuple[Field, ...]) -> str:
    rows = [f"| `{field.name}` | {field.treatment.value} | {field.accepts} |" for field in fields]
    return "\n".join([f"### `{title}`", "", "| field | treatment | accepts |", "|---|---|---|", *rows, ""])


if __name__ == "__main__":
    print(render_tables())
