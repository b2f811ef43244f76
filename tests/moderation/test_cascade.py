from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from moderation.cascade import (
    ENCODER_FOLDER,
    NGRAM_FOLDER,
    Blend,
    CascadeClassifier,
    CascadeConfig,
    Limits,
    load_classifier,
)
from moderation.categories import Category
from moderation.classifier import NgramClassifier, NgramConfig, Scores
from moderation.encoder import Encoder
from moderation.errors import ModerationError, WeightsError
from moderation.features import FeatureOptions
from moderation.presets import PRESETS
from moderation.targets import OUTPUTS
from moderation.train import encode_ngram_weights
from moderation.weight_files import CONFIG_FILE, TENSORS_FILE
from tests.moderation.test_encoder import make_network, save

pytestmark = pytest.mark.unit

LIMITS = Limits(0.2, {preset: {"en": 0.6, "zh": 0.7} for preset in PRESETS})
CONFIG = CascadeConfig(
    version="7",
    blends={"en": Blend(2.0, 0.5, -1.0), "zh": Blend(1.0, 0.0, 3.0)},
    input=LIMITS,
    output=Limits(0.8, {preset: {"en": 0.8, "zh": 0.9} for preset in PRESETS}),
    outputs=("hate", "jailbreak"),
    ngram_sha256="n",
    encoder_sha256="e",
)


class WordNgram(NgramClassifier):
    """Surely harmless where the text says "tea", open otherwise."""

    def __init__(self) -> None:
        config = NgramConfig("1", FeatureOptions(bucket_bits=8), 0.0, 1.0, 0.0, 0.5, "n")
        super().__init__(config, np.zeros(256, np.float32))

    def logit(self, text: str) -> float:
        return -3.0 if "tea" in text else 1.0

    def scores(self, texts: Sequence[str]) -> list[Scores]:
        return [Scores(1.0 / (1.0 + math.exp(-self.logit(text)))) for text in texts]


class TableEncoder:
    outputs = ("harmful", "hate", "sexual", "jailbreak")

    def __init__(self, logits: Sequence[float]) -> None:
        self._logits = logits
        self.read: list[str] = []

    def logits(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.read += texts
        return np.array([self._logits] * len(texts), np.float32)


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def test_the_encoder_reads_only_what_the_ngrams_leave_open() -> None:
    encoder = TableEncoder([2.0, 0.0, 0.0, 0.0])
    cascade = CascadeClassifier(CONFIG, WordNgram(), encoder)

    first, second, third = cascade.scores(["a cup of tea", "who knows", "more tea"])

    assert encoder.read == ["who knows"]
    assert first.probability == third.probability == pytest.approx(sigmoid(-3.0))
    assert second.probability == pytest.approx(sigmoid(2.0 * 2.0 + 0.5 * 1.0 - 1.0))


def test_each_language_has_its_blend_and_threshold() -> None:
    cascade = CascadeClassifier(CONFIG, WordNgram(), TableEncoder([2.0, 0.0, 0.0, 0.0]))

    (scores,) = cascade.scores(["你好吗"])

    assert scores.probability == pytest.approx(sigmoid(2.0 + 3.0))
    assert (cascade.threshold("strict", "en"), cascade.threshold("lenient", "zh")) == (0.6, 0.7)


def test_categories_are_those_with_enough_rows_and_never_likelier_than_the_whole() -> None:
    cascade = CascadeClassifier(CONFIG, WordNgram(), TableEncoder([0.0, 9.0, 9.0, -9.0]))

    read, unread = cascade.scores(["who knows", "tea"])

    assert cascade.trained_categories == (Category.HATE,)
    assert cascade.trained_extensions == ("jailbreak",)
    assert read.categories == {Category.HATE: pytest.approx(read.probability * sigmoid(9.0))}
    assert read.extensions["jailbreak"] < 0.001
    assert set(unread.categories) == {Category.HATE}
    assert max(*unread.categories.values(), *unread.extensions.values()) <= unread.probability


def test_a_logit_that_is_no_number_is_an_error_and_no_pass() -> None:
    cascade = CascadeClassifier(CONFIG, WordNgram(), TableEncoder([math.nan, 0.0, 0.0, 0.0]))

    with pytest.raises(ModerationError, match="not finite"):
        cascade.scores(["who knows"])


def test_a_sure_limit_of_zero_has_everything_read() -> None:
    encoder = TableEncoder([0.0] * 4)

    CascadeClassifier(replace(CONFIG, input=replace(LIMITS, sure_below=0.0)), WordNgram(), encoder).scores(["tea"])

    assert encoder.read == ["tea"]


@pytest.mark.parametrize(
    "change",
    [
        {"sure_below": 1.0},
        {"sure_below": math.nan},
        {"thresholds": {"balanced": {"en": 0.5, "zh": 0.5}}},
        {"thresholds": {preset: {"en": 0.0, "zh": 0.5} for preset in PRESETS}},
    ],
)
def test_a_configuration_that_cannot_decide_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ModerationError, match="thresholds"):
        replace(LIMITS, **change)  # pyright: ignore[reportArgumentType]


def test_a_language_without_a_blend_is_refused() -> None:
    with pytest.raises(ModerationError, match="blends"):
        replace(CONFIG, blends={"en": Blend(1.0, 1.0, 0.0)})


def test_windows_of_answers_have_limits_of_their_own() -> None:
    encoder = TableEncoder([2.0, 0.0, 0.0, 0.0])
    cascade = CascadeClassifier(CONFIG, WordNgram(), encoder).for_output

    (scores,) = cascade.scores(["who knows"])  # the n-grams say 0.73, less than 0.8

    assert encoder.read == []
    assert scores.probability == pytest.approx(sigmoid(1.0))
    assert cascade.threshold("balanced", "en") == 0.8


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A weights directory of a tiny cascade."""
    root = tmp_path / "weights"
    root.mkdir()
    encoder = Encoder.load(save(make_network(), root / ENCODER_FOLDER))
    weights = encode_ngram_weights(np.zeros(256, np.float16))
    config = NgramConfig("1", FeatureOptions(bucket_bits=8), 0.0, 1.0, 0.0, 0.5, sha256_of(weights))
    (root / NGRAM_FOLDER).mkdir()
    (root / NGRAM_FOLDER / TENSORS_FILE).write_bytes(weights)
    (root / NGRAM_FOLDER / CONFIG_FILE).write_bytes(msgspec.json.encode(config))
    cascade = replace(CONFIG, ngram_sha256=config.weights_sha256, encoder_sha256=encoder.config.weights_sha256)
    (root / CONFIG_FILE).write_bytes(msgspec.json.encode(cascade))
    return root


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_written_cascade_is_read_back(directory: Path) -> None:
    classifier = load_classifier(directory)

    assert (classifier.name, classifier.version) == ("causerie-moderation", "7")
    (scores,) = classifier.scores(["hello world"])
    assert 0.0 < scores.probability < 1.0


def test_ngrams_alone_are_a_classifier_too(directory: Path) -> None:
    assert load_classifier(directory / NGRAM_FOLDER).name == "causerie-moderation-ngram"


def test_parts_of_another_cascade_are_refused(directory: Path, tmp_path: Path) -> None:
    shutil.rmtree(directory / ENCODER_FOLDER)
    save(make_network(seed=1), directory / ENCODER_FOLDER)

    with pytest.raises(WeightsError, match="the cascade was made with"):
        load_classifier(directory)


def test_outputs_that_the_encoder_lacks_are_refused(directory: Path) -> None:
    config = msgspec.json.decode((directory / CONFIG_FILE).read_bytes(), type=CascadeConfig)
    (directory / CONFIG_FILE).write_bytes(msgspec.json.encode(replace(config, outputs=("fun",))))

    with pytest.raises(WeightsError, match="fun"):
        load_classifier(directory)
    assert "fun" not in OUTPUTS
