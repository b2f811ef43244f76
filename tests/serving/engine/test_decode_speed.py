from __future__ import annotations

from pathlib import Path

import pytest
import torch

from serving.engine.decode_speed import MAX_TOKENS, TIME_LIMIT_S, measure_decode_speed
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
