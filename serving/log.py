"""Logging set up once per process: `key=value` lines for people, JSON lines for machines, both on stderr.

Called by the command line and by the engine process. Modules only do `logging.getLogger(__name__)`. The text of prompts
and answers is never logged at INFO.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from enum import StrEnum
from typing import TextIO

__all__ = ["LogFormat", "configure_logging"]

# Libraries that would repeat what we log or print a line per request.
_QUIET_LOGGERS = ("httpx", "httpcore", "asyncio", "gradio", "matplotlib", "urllib3", "filelock", "multipart")


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


class KeyValueFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO serving.engine.client engine_ready pid=12`: one line per event."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{timestamp(record)} {record.levelname} {record.name} {record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """The same fields as one JSON object a line; a traceback goes into `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": timestamp(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def timestamp(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, tz=UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def configure_logging(log_format: LogFormat, level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Replaces the root handlers. uvicorn's loggers go through ours; its line per request is off."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format is LogFormat.JSON else KeyValueFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers[:] = []
        logger.propagate = True
    logging.getLogger("uvicorn.access").disabled = True
    logging.captureWarnings(capture=True)
