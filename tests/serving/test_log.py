from __future__ import annotations

import io
import json
import logging
from collections.abc import Generator

import pytest

from serving.log import LogFormat, configure_logging

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def restored_logging() -> Generator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    logging.getLogger("uvicorn.access").disabled = False


def test_text_lines_carry_time_level_logger_and_event() -> None:
    stream = io.StringIO()
    configure_logging(LogFormat.TEXT, stream=stream)
    logging.getLogger("serving.x").info("engine_ready pid=%d", 7)
    assert stream.getvalue().endswith("Z INFO serving.x engine_ready pid=7\n")


def test_json_lines_are_one_object_each_with_the_traceback_inside() -> None:
    stream = io.StringIO()
    configure_logging(LogFormat.JSON, stream=stream)
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("serving.x").exception("engine_failed")
    (line,) = stream.getvalue().splitlines()
    fields = json.loads(line)
    assert fields["message"] == "engine_failed"
    assert "ValueError: boom" in fields["exception"]


def test_there_is_no_line_per_request() -> None:
    stream = io.StringIO()
    configure_logging(LogFormat.TEXT, stream=stream)
    logging.getLogger("uvicorn.access").info("GET / 200")
    logging.getLogger("httpx").info("HTTP Request")
    assert stream.getvalue() == ""
