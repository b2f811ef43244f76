"""Everything that can go wrong while serving, and the HTTP status it becomes.

ServiceError
├── InvalidRequest 400 (param)
│   └── PromptTooLong 400 (tokens, limit)
├── ContentFlagged 400 (content_filter_result)
├── NotAuthorized 401
├── Forbidden 403
├── UnknownModel 404
├── UnknownRequest 404
├── BodyTooLarge 413
├── UnsupportedMediaType 415
├── RateLimited 429 (retry_after_s)
│   └── QueueFull 429
└── Unavailable 503 (retry_after_s)
    ├── EngineStopped
    └── ModerationUnavailable

Start-up only: ConfigError, and CheckpointError from `quant.errors`, below serving in the import order.
"""

from __future__ import annotations

from typing import ClassVar

from quant.errors import CheckpointError

__all__ = [
    "BodyTooLarge",
    "CheckpointError",
    "ConfigError",
    "ContentFlagged",
    "EngineStopped",
    "Forbidden",
    "InvalidRequest",
    "ModerationUnavailable",
    "NotAuthorized",
    "PromptTooLong",
    "QueueFull",
    "RateLimited",
    "ServiceError",
    "Unavailable",
    "UnknownModel",
    "UnknownRequest",
    "UnsupportedMediaType",
]


class ConfigError(Exception):
    """A setting cannot be used. The message says which, where it came from, what it was and what is allowed."""


class ServiceError(Exception):
    """Base of every error that a client may see. `kind` and `code` are OpenAI's `type` and `code`."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(ServiceError):
    status = 400
    kind = "invalid_request_error"


class PromptTooLong(InvalidRequest):
    code = "context_length_exceeded"

    def __init__(self, tokens: int, limit: int, *, param: str | None = "messages") -> None:
        super().__init__(f"prompt has {tokens:,} tokens; this server accepts {limit:,} for it", param=param)
        self.tokens = tokens
        self.limit = limit


class ContentFlagged(ServiceError):
    """`content_filter_result` is what goes under `innererror`: plain JSON values."""

    status = 400
    kind = "invalid_request_error"
    code = "content_filter"

    def __init__(self, message: str, content_filter_result: dict[str, object], *, param: str = "messages") -> None:
        super().__init__(message, param=param)
        self.content_filter_result = content_filter_result


class NotAuthorized(ServiceError):
    status = 401
    kind = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(ServiceError):
    status = 403
    kind = "invalid_request_error"


class UnknownModel(ServiceError):
    status = 404
    kind = "invalid_request_error"
    code = "model_not_found"


class UnknownRequest(ServiceError):
    status = 404
    kind = "invalid_request_error"
    code = "request_not_found"


class BodyTooLarge(ServiceError):
    status = 413
    kind = "invalid_request_error"


class UnsupportedMediaType(ServiceError):
    status = 415
    kind = "invalid_request_error"


class RateLimited(ServiceError):
    status = 429
    kind = "rate_limit_error"
    code = "rate_limit_exceeded"


class QueueFull(RateLimited):
    code = "queue_full"


class Unavailable(ServiceError):
    status = 503
    kind = "server_error"
    code = "unavailable"


class EngineStopped(Unavailable):
    code = "engine_stopped"


class ModerationUnavailable(Unavailable):
    code = "moderation_unavailable"
