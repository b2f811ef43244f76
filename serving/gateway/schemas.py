"""Request bodies as typed records: what `fields.py` lets through, checked value by value.

Nothing here knows the model: defaults that come from its generation_config.json are applied in `sampling.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from moderation.policy import Turn
from serving.errors import InvalidRequest
from serving.gateway.fields import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    MESSAGE_FIELDS,
    MODERATION_FIELDS,
    STREAM_OPTION_FIELDS,
    JsonObject,
    JsonValue,
    check_fields,
)
from serving.gateway.json_reader import (
    INT64_HIGH,
    INT64_LOW,
    name_of,
    read_bool,
    read_float,
    read_int,
    read_required_str,
)
from serving.gateway.ports import RequestLimits
from serving.model.chat_format import ChatMessage

MAX_TOP_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 5
DEFAULT_COMPLETION_TOKENS = 16
_MAX_TOP_K = 2**31 - 1
_MAX_LISTED_CHARACTERS = 400_000

Role = Literal["system", "user", "assistant", "tool"]
Prompt = str | tuple[int, ...]

_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """What the client asked for; None where it said nothing."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    num_choices: int
    num_top_logprobs: int | None  # None: no log-probabilities; 0: of the chosen token only


@dataclass(frozen=True, slots=True)
class StreamRequest:
    is_streamed: bool
    includes_usage: bool


@dataclass(frozen=True, slots=True)
class ChatRequest:
    model: str
    messages: tuple[ChatMessage, ...]
    sampling: SamplingRequest
    stream: StreamRequest


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    model: str
    prompts: tuple[Prompt, ...]
    sampling: SamplingRequest
    stream: StreamRequest
    echoes_prompt: bool


@dataclass(frozen=True, slots=True)
class ModerationRequest:
    """`turns`: one conversation, judged as a whole, in place of texts that are judged one by one."""

    model: str | None
    texts: list[str]
    turns: tuple[Turn, ...] | None = None


def parse_chat(body: JsonObject, limits: RequestLimits) -> ChatRequest:
    check_fields(body, CHAT_FIELDS)
    return ChatRequest(
        model=read_required_str(body, "model"),
        messages=_read_messages(body, limits),
        sampling=_read_sampling(
            body, limits, max_tokens=_read_max_tokens(body, limits), num_top_logprobs=_read_chat_logprobs(body)
        ),
        stream=_read_stream(body),
    )


def parse_completion(body: JsonObject, limits: RequestLimits) -> CompletionRequest:
    check_fields(body, COMPLETION_FIELDS)
    echoes_prompt = read_bool(body, "echo")
    max_tokens = read_int(body, "max_tokens", 0 if echoes_prompt else 1, limits.max_tokens)
    num_top_logprobs = read_int(body, "logprobs", 0, MAX_COMPLETION_LOGPROBS)
    request = CompletionRequest(
        model=read_required_str(body, "model"),
        prompts=_read_prompts(body),
        sampling=_read_sampling(
            body,
            limits,
            max_tokens=DEFAULT_COMPLETION_TOKENS if max_tokens is None else max_tokens,
            num_top_logprobs=num_top_logprobs,
        ),
        stream=_read_stream(body),
        echoes_prompt=echoes_prompt,
    )
    num_choices = len(request.prompts) * request.sampling.num_choices
    if num_choices > limits.max_choices:
        message = f"prompts times n is {num_choices}; this server allows {limits.max_choices} choices in one request"
        raise InvalidRequest(message, param="prompt")
    if request.stream.is_streamed and echoes_prompt and num_top_logprobs is not None:
        raise InvalidRequest("echo together with logprobs is not supported with stream", param="echo")
    return request


def parse_moderation(body: JsonObject, limits: RequestLimits) -> ModerationRequest:
    check_fields(body, MODERATION_FIELDS)
    model = None if body.get("model") is None else read_required_str(body, "model")
    if _holds_messages(body.get("input")):
        messages = _read_messages(body, limits, name="input")
        return ModerationRequest(model, [], tuple(Turn(message.role, message.content) for message in messages))
    return ModerationRequest(model, _read_texts(body, limits))


def _holds_messages(value: JsonValue) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "role" in one for one in value)


def _read_texts(body: JsonObject, limits: RequestLimits) -> list[str]:
    value = body.get("input")
    texts: JsonValue = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise InvalidRequest("input must be a string or a list of strings, parts or messages, not empty", param="input")
    if len(texts) > limits.max_messages:
        raise InvalidRequest(f"input has {len(texts)} entries; this server takes {limits.max_messages}", param="input")
    if all(isinstance(text, dict) for text in texts):
        return [_join_parts(texts, "input")]
    found = [_require_text(text, f"input[{index}]") for index, text in enumerate(texts)]
    num_characters = sum(map(len, found))
    # Of one long text the policy bounds the work itself; of many middling ones only their sum does.
    if len(found) > 1 and num_characters > _MAX_LISTED_CHARACTERS:
        message = f"the strings of input have {num_characters:,} characters; a list may have {_MAX_LISTED_CHARACTERS:,}"
        raise InvalidRequest(f"{message}. Send them in several requests", param="input")
    return found


# -- messages and prompts ---------------------------------------------------------------------------------------------


def _read_messages(body: JsonObject, limits: RequestLimits, *, name: str = "messages") -> tuple[ChatMessage, ...]:
    messages = body.get(name)
    if messages is None:
        raise InvalidRequest(f"you must provide a {name} parameter", param=name)
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest(f"{name} must be a list with at least one message", param=name)
    if len(messages) > limits.max_messages:
        message = f"{name} has {len(messages):,} entries; this server accepts {limits.max_messages:,}"
        raise InvalidRequest(message, param=name)
    return tuple(_read_message(message, f"{name}[{index}]") for index, message in enumerate(messages))


def _read_message(message: JsonValue, path: str) -> ChatMessage:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{path} must be an object, not {name_of(message)}", param=path)
    check_fields(message, MESSAGE_FIELDS, path=f"{path}.")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        shown = f"{role[:40]!r}" if isinstance(role, str) else name_of(role)
        raise InvalidRequest(f"{path}.role is {shown}; it must be one of {', '.join(_ROLES)}", param=f"{path}.role")
    return ChatMessage(role=_ROLES[role], content=_read_content(message.get("content"), f"{path}.content"))


def _read_content(content: JsonValue, path: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return _join_parts(content, path)
    raise InvalidRequest(f"{path} must be a string or a list of text parts, not {name_of(content)}", param=path)


def _join_parts(parts: list[JsonValue], path: str) -> str:
    return "".join(_read_part(part, f"{path}[{index}]") for index, part in enumerate(parts))


def _read_part(part: JsonValue, path: str) -> str:
    if not isinstance(part, dict):
        raise InvalidRequest(f"{path} must be a text part, not {name_of(part)}", param=path)
    if part.get("type") != "text":
        raise InvalidRequest(f"{path}.type must be 'text'; this server reads nothing else", param=f"{path}.type")
    unknown = next((name for name in part if name not in ("type", "text")), None)
    if unknown is not None:
        raise InvalidRequest(f"Unrecognized request argument supplied: {path}.{unknown}", param=f"{path}.{unknown}")
    return _require_text(part.get("text"), f"{path}.text")


def _require_text(value: JsonValue, path: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{path} must be a string, not {name_of(value)}", param=path)
    return value


def _read_prompts(body: JsonObject) -> tuple[Prompt, ...]:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return (prompt,)
    if not isinstance(prompt, list) or not prompt:
        raise InvalidRequest("prompt must be a string, strings, token ids or lists of token ids", param="prompt")
    if all(isinstance(item, str) for item in prompt):
        return tuple(cast("list[str]", prompt))
    if _is_ids(prompt):
        return (tuple(cast("list[int]", prompt)),)
    if all(isinstance(item, list) and _is_ids(item) for item in prompt):
        return tuple(tuple(item) for item in cast("list[list[int]]", prompt))
    raise InvalidRequest("prompt mixes kinds; send strings, token ids or lists of token ids", param="prompt")


def _is_ids(items: list[JsonValue]) -> bool:
    return bool(items) and all(isinstance(item, int) and not isinstance(item, bool) for item in items)


# -- sampling ---------------------------------------------------------------------------------------------------------


def _read_sampling(
    body: JsonObject, limits: RequestLimits, *, max_tokens: int | None, num_top_logprobs: int | None
) -> SamplingRequest:
    num_choices = read_int(body, "n", 1, limits.max_choices)
    return SamplingRequest(
        max_tokens=max_tokens,
        temperature=read_float(body, "temperature", 0.0, 2.0),
        top_p=read_float(body, "top_p", 0.0, 1.0),
        top_k=read_int(body, "top_k", -1, _MAX_TOP_K),
        presence_penalty=read_float(body, "presence_penalty", -2.0, 2.0),
        frequency_penalty=read_float(body, "frequency_penalty", -2.0, 2.0),
        repetition_penalty=read_float(body, "repetition_penalty", 0.01, 10.0),
        seed=read_int(body, "seed", INT64_LOW, INT64_HIGH),
        stop=_read_stop(body.get("stop"), limits),
        ignore_eos=read_bool(body, "ignore_eos"),
        num_choices=1 if num_choices is None else num_choices,
        num_top_logprobs=num_top_logprobs,
    )


def _read_max_tokens(body: JsonObject, limits: RequestLimits) -> int | None:
    older = read_int(body, "max_tokens", 1, limits.max_tokens)
    newer = read_int(body, "max_completion_tokens", 1, limits.max_tokens)
    if older is not None and newer is not None and older != newer:
        message = f"max_tokens is {older} and max_completion_tokens {newer}; send one of them"
        raise InvalidRequest(message, param="max_tokens")
    return newer if newer is not None else older


def _read_chat_logprobs(body: JsonObject) -> int | None:
    is_wanted = read_bool(body, "logprobs")
    num_top = read_int(body, "top_logprobs", 0, MAX_TOP_LOGPROBS)
    if num_top is not None and not is_wanted:
        raise InvalidRequest("top_logprobs needs logprobs set to true", param="top_logprobs")
    return (num_top or 0) if is_wanted else None


def _read_stop(value: JsonValue, limits: RequestLimits) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise InvalidRequest(f"stop must be a string or a list of strings, not {name_of(value)}", param="stop")
    if len(stops) > limits.max_stop:
        raise InvalidRequest(f"stop has {len(stops)} strings; this server accepts {limits.max_stop}", param="stop")
    return tuple(_read_stop_string(stop, limits) for stop in stops)


def _read_stop_string(stop: JsonValue, limits: RequestLimits) -> str:
    if not isinstance(stop, str) or not stop:
        raise InvalidRequest("every stop must be a string that is not empty", param="stop")
    if len(stop) > limits.max_stop_length:
        message = f"a stop string has {len(stop):,} characters; this server accepts {limits.max_stop_length:,}"
        raise InvalidRequest(message, param="stop")
    return stop


def _read_stream(body: JsonObject) -> StreamRequest:
    is_streamed = read_bool(body, "stream")
    options = body.get("stream_options")
    if options is None:
        return StreamRequest(is_streamed, includes_usage=False)
    if not isinstance(options, dict):
        raise InvalidRequest(f"stream_options must be an object, not {name_of(options)}", param="stream_options")
    if not is_streamed:
        raise InvalidRequest("stream_options needs stream set to true", param="stream_options")
    check_fields(options, STREAM_OPTION_FIELDS, path="stream_options.")
    return StreamRequest(is_streamed, includes_usage=read_bool(options, "include_usage"))
