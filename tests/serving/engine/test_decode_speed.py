from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from quant.report.quantization_report import DecodeSpeed
from serving.engine import decode_speed
from serving.engine.decode_speed import MAX_TOKENS, TIME_LIMIT_S, main, measure_decode_speed, measure_in_child
from tests.quant.tiny_models import write_source
from tests.serving.model.tiny_tokenizers import write_tokenizer

pytestmark = pytest.mark.unit


class SteppedClock:
    """Each look at it takes `step` seconds."""

    def __init__(self, step: float) -> None:
        self._now, self._step = 0.0, step

    def __call__(self) -> float:
        self._now += self._step
        return self._now


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = write_source(tmp_path / "source", vocab_size=2048)
    write_tokenizer("smollm2", directory)
    return directory


def test_tokens_after_the_first_are_counted_against_the_clock(source: Path) -> None:
    speed = measure_decode_speed(source, SteppedClock(0.001))
    assert speed.load_seconds == pytest.approx(0.001)
    # One look starts it, one before each token, one that finds it done, one at the end.
    assert speed.tokens_per_second == pytest.approx(MAX_TOKENS / ((MAX_TOKENS + 1) * 0.001), rel=0.02)
    assert speed.threads == torch.get_num_threads()


def test_a_slow_model_is_stopped_at_the_time_limit(source: Path) -> None:
    speed = measure_decode_speed(source, SteppedClock(TIME_LIMIT_S / 4))
    assert 0 < speed.tokens_per_second < 4


def replace_child(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    def command(module: str, *arguments: str) -> list[str]:
        assert module == "serving.engine.decode_speed"
        return [sys.executable, "-c", script, *arguments]

    monkeypatch.setattr(decode_speed, "python_command", command)


def test_a_child_reports_each_directory_and_one_that_cannot_be_served_has_no_speed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(source), str(tmp_path)]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["directory"] == str(source)
    assert first["speed"]["tokens_per_second"] > 0
    assert second == {"directory": str(tmp_path), "speed": None}


def test_speeds_come_back_in_the_order_of_the_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = '{"directory": sys.argv[2], "speed": {"load_seconds": 1.0, "tokens_per_second": 50.0, "threads": 2}}'
    replace_child(monkeypatch, f"import json, sys; print(json.dumps({line}))")
    found = measure_in_child([tmp_path / "one", tmp_path / "two"])
    assert found == [None, DecodeSpeed(1.0, 50.0, 2)]


@pytest.mark.parametrize("script", ["raise SystemExit(1)", "print('no json')", "import os; os.kill(os.getpid(), 9)"])
def test_a_child_that_fails_costs_the_report_its_speeds_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    replace_child(monkeypatch, script)
    assert measure_in_child([tmp_path]) == [None]


def test_weights_that_are_too_large_are_not_loaded(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_speed, "MOST_DECODED_BYTES", 10)
    replace_child(monkeypatch, "raise SystemExit('must not be started')")
    assert measure_in_child([source]) == [None]
