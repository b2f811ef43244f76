"""The binary text classifier: harmful or not, as a calibrated probability. Knows texts, not conversations.

`TextClassifier` is the seam that a transformer may take later; `NgramClassifier` is logistic regression over hashed
n-grams, read from safetensors and evaluated with numpy alone. `moderation.policy` is the only caller in serving.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moderation.categories import Category
from moderation.errors import WeightsError
from moderation.features import FeatureOptions, hash_features
from moderation.presets import Language, PresetName
from moderation.weight_files import CONFIG_FILE, CURE, TENSORS_FILE, read_config, read_tensors

__all__ = ["NGRAM_FORMAT", "NgramClassifier", "NgramConfig", "Scores", "TextClassifier", "shipped_weights"]

NGRAM_FORMAT = "causerie-ngram-1"


@dataclass(frozen=True, slots=True)
class Scores:
    """What a classifier says of one text; every number is a probability.

    `categories` holds the trained ones only, `extensions` names outside OpenAI's list ("jailbreak").
    """

    probability: float
    categories: Mapping[Category, float] = field(default_factory=dict)
    extensions: Mapping[str, float] = field(default_factory=dict)


class TextClassifier(Protocol):
    """Deterministic and thread-safe. A text it cannot judge raises ModerationError; it never answers a default."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def trained_categories(self) -> tuple[Category, ...]: ...
    @property
    def trained_extensions(self) -> tuple[str, ...]: ...
    @property
    def for_output(self) -> TextClassifier:
        """The same weights as they judge windows of generated text."""
        ...

    def threshold(self, preset: PresetName, language: Language) -> float:
        """The probability from which on the policy flags, chosen at training time."""
        ...

    def scores(self, texts: Sequence[str]) -> list[Scores]:
        """One for each text, in order, each as if it were alone."""
        ...

    def quick_scores(self, texts: Sequence[str]) -> list[Scores]:
        """Like `scores`, in well under a millisecond a text and possibly less exact."""
        ...


@dataclass(frozen=True, slots=True)
class NgramConfig:
    """config.json of a weights directory. probability = sigmoid(slope * (features . weights + bias) + intercept)."""

    version: str
    features: FeatureOptions
    bias: float
    slope: float
    intercept: float
    threshold: float
    weights_sha256: str
    format: str = NGRAM_FORMAT


def shipped_weights() -> Path:
    return Path(__file__).parent / "weights"


class NgramClassifier:
    """Logistic regression over hashed n-grams. Holds only constants after construction."""

    def __init__(self, config: NgramConfig, weights: npt.NDArray[np.float32]) -> None:
        """weights: (2**bucket_bits,) float32, one per bucket."""
        self._config = config
        self._weights = weights

    @property
    def name(self) -> str:
        return "causerie-moderation-ngram"

    @property
    def version(self) -> str:
        return self._config.version

    @property
    def trained_categories(self) -> tuple[Category, ...]:
        return ()

    @property
    def trained_extensions(self) -> tuple[str, ...]:
        return ()

    @property
    def for_output(self) -> NgramClassifier:
        return self

    def threshold(self, preset: PresetName, language: Language) -> float:
        return self._config.threshold

    @classmethod
    def load(cls, directory: Path | None = None) -> NgramClassifier:
        """Reads and checks a weights directory, the shipped one by default. Raises WeightsError."""
        root = shipped_weights() if directory is None else directory
        config = _read_config(root / CONFIG_FILE)
        weights = _read_weights(root / TENSORS_FILE, config)
        return cls(config, weights)

    def scores(self, texts: Sequence[str]) -> list[Scores]:
        return [Scores(self._calibrate(self.logit(text))) for text in texts]

    @property
    def config(self) -> NgramConfig:
        return self._config

    @property
    def weights(self) -> npt.NDArray[np.float32]:
        return self._weights

    def quick_scores(self, texts: Sequence[str]) -> list[Scores]:
        return self.scores(texts)

    def with_config(self, config: NgramConfig) -> NgramClassifier:
        """The same weights with another calibration or threshold."""
        return NgramClassifier(config, self._weights)

    def logit(self, text: str) -> float:
        """The raw margin before calibration."""
        features = hash_features(text, self._config.features)
        return float(self._weights[features.indices] @ features.values) + self._config.bias

    def _calibrate(self, logit: float) -> float:
        z = self._config.slope * logit + self._config.intercept
        return float(1.0 / (1.0 + np.exp(-np.clip(z, -60.0, 60.0))))


def _read_config(path: Path) -> NgramConfig:
    config = read_config(path, NgramConfig, NGRAM_FORMAT)
    numbers = (config.bias, config.slope, config.intercept, config.threshold)
    if not all(math.isfinite(number) for number in numbers) or not 0.0 < config.threshold <= 1.0 or config.slope <= 0.0:
        raise WeightsError(path, "numbers not finite, or threshold outside (0, 1], or slope not positive", CURE)
    return config


def _read_weights(path: Path, config: NgramConfig) -> npt.NDArray[np.float32]:
    weights = read_tensors(path, config.weights_sha256).get("weights")
    expected = (1 << config.features.bucket_bits,)
    if weights is None or weights.shape != expected or not np.isfinite(weights).all():
        found = "missing" if weights is None else f"of shape {weights.shape} or with values unusable"
        raise WeightsError(path, f"tensor 'weights' is {found}, expected {expected}, finite", CURE)
    return weights.astype(np.float32)
