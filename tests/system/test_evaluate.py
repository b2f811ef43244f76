"""The default model in 4 bits against its source, by the command: what quantising it cost, from real weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from quant.progress import SilentProgress
from serving.cli import main
from serving.models import cache_directory
from serving.preparation import prepare_model, prepare_source
from tests.system.server_process import MODEL

pytestmark = pytest.mark.system

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cache, out = cache_directory(os.environ), tmp_path_factory.mktemp("evaluation") / "report"
    quantised = prepare_model(MODEL, cache, SilentProgress())
    source = prepare_source(MODEL, cache, SilentProgress())
    sizes = ["--max-prompts", "4", "--max-new-tokens", "16", "--max-text-bytes", "4096"]
    measures = ["--measures", "texts", "conversations", "kl", "lengths", "vicuna"]
    texts = ["--texts", str(DATA / "eval" / "ppl_books_en.txt")]
    words = ["evaluate", str(quantised), "--against", str(source), "--data", str(DATA), "--out", str(out)]
    assert main([*words, *sizes, *texts, *measures]) == 0
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def test_four_bits_cost_a_little_perplexity_and_not_a_lot(report: dict[str, Any]) -> None:
    increase = report["measures"]["perplexity_increase_percent"]["value"]
    assert 0 < increase < 25
    assert report["measures"]["perplexity"]["value"] < 60


def test_four_bits_stay_near_the_source(report: dict[str, Any]) -> None:
    assert 0 < report["measures"]["kl_per_token_k3"]["value"] < 0.5


def test_a_trained_model_finds_the_assistants_words_likelier_than_books(report: dict[str, Any]) -> None:
    measures = report["measures"]
    assert measures["answer_bits_per_byte"]["value"] < measures["bits_per_byte"]["value"]
