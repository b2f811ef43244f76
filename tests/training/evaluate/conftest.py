"""Model directories that several modules' tests share; nothing writes into them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.evaluate.tiny_models import write_llama
from training.evaluate.player import Player, load_player


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("evaluated") / "model", seed=0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer and other weights."""
    return write_llama(tmp_path_factory.mktemp("evaluated") / "other", seed=1)


@pytest.fixture(scope="session")
def player(model: Path) -> Player:
    return load_player(model, precision="float32", kv_megabytes=8)
