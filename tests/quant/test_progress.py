from __future__ import annotations

import io
import json

import pytest

from quant.progress import BarProgress, JsonLinesProgress, LineProgress

pytestmark = pytest.mark.unit


def test_json_lines_carry_every_update() -> None:
    stream = io.StringIO()
    sink = JsonLinesProgress(stream)
    sink.update("quantise", 1, 3)
    assert json.loads(stream.getvalue()) == {"stage": "quantise", "done": 1, "total": 3}


def test_a_log_gets_one_line_when_a_stage_begins_and_one_when_it_ends() -> None:
    stream = io.StringIO()
    sink = LineProgress(stream)
    for done in (0, 1, 2, 3):
        sink.update("quantise", done, 3)
    assert stream.getvalue() == "quantise ...\nquantise done\n"


def test_a_stage_that_is_over_at_once_is_one_line() -> None:
    stream = io.StringIO()
    sink = LineProgress(stream)
    sink.update("trial 1", 0, 2)
    sink.update("trial 1: +2.41 %", 1, 1)
    assert stream.getvalue() == "trial 1 ...\ntrial 1: +2.41 %\n"


def test_the_bar_takes_stages_one_after_another() -> None:
    with BarProgress() as bar:
        bar.update("first", 1, 2)
        bar.update("first", 2, 2)
        bar.update("second", 0, 1)
