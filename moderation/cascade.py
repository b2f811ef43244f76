"""Two classifiers as one: n-grams pass what is surely harmless at once, the encoder reads the rest.

Most messages cost the n-grams' fraction of a millisecond; the encoder's tens of milliseconds are spent where the answer
is open. The final probability is a logistic blend of both logits, fitted for each language on held-out rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moderation.categories import Category
from moderation.classifier import NGRAM_FORMAT, NgramClassifier, Scores, TextClassifier, shipped_weights
from moderation.encoder import Encoder
from moderation.errors import ModerationError, WeightsError
from moderation.presets import LANGUAGES, PRESETS, Language, PresetName, language_of
from moderation.weight_files import CONFIG_FILE, CURE, read_config, read_format

__all__ = [
    "CASCADE_FORMAT",
    "ENCODER_FOLDER",
    "NGRAM_FOLDER",
    "Blend",
    "CascadeClassifier",
    "CascadeConfig",
    "Limits",
    "load_classifier",
]

CASCADE_FORMAT = "causerie-cascade-1"
NGRAM_FOLDER, ENCODER_FOLDER = "ngram", "encoder"
HARMFUL = "harmful"
SATURATED = 60.0


class LogitReader(Protocol):
    """The shape of `moderation.encoder.Encoder`, for tests with a small one."""

    @property
    def outputs(self) -> Sequence[str]: ...
    def logits(self, texts: Sequence[str]) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True)
class Blend:
    """probability = sigmoid(encoder * the encoder's logit + ngram * the n-grams' logit + intercept)."""

    encoder: float
    ngram: float
    intercept: float


@dataclass(frozen=True, slots=True)
class Limits:
    """What one direction decides by.

    sure_below: n-gram probability below which a text passes unread; 0 has the encoder read everything.
    """

    sure_below: float
    thresholds: dict[PresetName, dict[Language, float]]

    def __post_init__(self) -> None:
        values = [value for of_language in self.thresholds.values() for value in of_language.values()]
        is_complete = set(self.thresholds) == set(PRESETS) and all(
            set(of_language) == set(LANGUAGES) for of_language in self.thresholds.values()
        )
        if not is_complete or not all(0.0 < value <= 1.0 for value in values) or not 0.0 <= self.sure_below < 1.0:
            raise ModerationError(
                f"thresholds {self.thresholds} and sure_below {self.sure_below} cannot be used; expected one above 0 "
                f"and at most 1 for each of {PRESETS} and {LANGUAGES}, and sure_below from 0 to below 1"
            )


@dataclass(frozen=True, slots=True)
class CascadeConfig:
    """config.json of a weights directory that holds `ngram/` and `encoder/`.

    input, output: an answer is judged many times while it grows, a message once: hence limits for each.
    outputs: names of the encoder's logits that had enough rows to be reported; the others say nothing.
    """

    version: str
    blends: dict[Language, Blend]
    input: Limits
    output: Limits
    outputs: tuple[str, ...]
    ngram_sha256: str
    encoder_sha256: str
    format: str = CASCADE_FORMAT

    def __post_init__(self) -> None:
        if set(self.blends) != set(LANGUAGES):
            raise ModerationError(f"blends for {sorted(self.blends)}; expected one for each of {LANGUAGES}")


class CascadeClassifier:
    """Thread-safe: holds only constants after construction. Judges by the limits for input, unless told others."""

    def __init__(
        self, config: CascadeConfig, ngram: NgramClassifier, encoder: LogitReader, limits: Limits | None = None
    ) -> None:
        self._config = config
        self._limits = limits or config.input
        self._ngram = ngram
        self._encoder = encoder
        self._harmful = list(encoder.outputs).index(HARMFUL)
        self._index = {name: index for index, name in enumerate(encoder.outputs) if name in config.outputs}
        self.trained_categories = tuple(category for category in Category if category.value in self._index)
        known = {HARMFUL, *(category.value for category in Category)}
        self.trained_extensions = tuple(name for name in self._index if name not in known)

    @property
    def name(self) -> str:
        return "causerie-moderation"

    @property
    def version(self) -> str:
        return self._config.version

    @property
    def config(self) -> CascadeConfig:
        return self._config

    def with_config(self, config: CascadeConfig) -> CascadeClassifier:
        """The same weights with another calibration or other thresholds."""
        return CascadeClassifier(config, self._ngram, self._encoder)

    @property
    def for_output(self) -> CascadeClassifier:
        return CascadeClassifier(self._config, self._ngram, self._encoder, self._config.output)

    def threshold(self, preset: PresetName, language: Language) -> float:
        return self._limits.thresholds[preset][language]

    def quick_scores(self, texts: Sequence[str]) -> list[Scores]:
        """What the n-grams say alone."""
        return [self._unread(scores.probability) for scores in self._ngram.scores(texts)]

    def scores(self, texts: Sequence[str]) -> list[Scores]:
        """One for each text. Raises ModerationError where a number is not finite."""
        found = self.quick_scores(texts)
        is_open = [index for index, scores in enumerate(found) if not scores.probability < self._limits.sure_below]
        if is_open:
            unsure = [texts[index] for index in is_open]
            for index, text, logits in zip(is_open, unsure, self._encoder.logits(unsure), strict=True):
                found[index] = self._read(text, logits)
        return found

    def _unread(self, probability: float) -> Scores:
        """What the n-grams pass: no category can be likelier than harm as a whole."""
        return Scores(
            probability,
            dict.fromkeys(self.trained_categories, probability),
            dict.fromkeys(self.trained_extensions, probability),
        )

    def _read(self, text: str, logits: npt.NDArray[np.float32]) -> Scores:
        if not np.isfinite(logits).all():
            raise ModerationError("the encoder's logits are not finite; reinstall causerie")
        blend = self._config.blends[language_of(text)]
        harmful = blend.encoder * float(logits[self._harmful]) + blend.ngram * self._ngram.logit(text) + blend.intercept
        probability = _sigmoid(harmful)
        # Read as "of this category, given that it is harmful", so that no category outgrows the whole.
        shares = {name: probability * _sigmoid(float(logits[index])) for name, index in self._index.items()}
        return Scores(
            probability,
            {category: shares[category.value] for category in self.trained_categories},
            {name: shares[name] for name in self.trained_extensions},
        )


def load_classifier(directory: Path | None = None) -> TextClassifier:
    """The classifier of a weights directory, the shipped one by default: a cascade, or n-grams alone.

    Raises WeightsError.
    """
    root = shipped_weights() if directory is None else directory
    if read_format(root / CONFIG_FILE) == NGRAM_FORMAT:
        return NgramClassifier.load(root)
    config = read_config(root / CONFIG_FILE, CascadeConfig, CASCADE_FORMAT)
    ngram, encoder = NgramClassifier.load(root / NGRAM_FOLDER), Encoder.load(root / ENCODER_FOLDER)
    _check_parts(root, config, {"ngram": ngram.config.weights_sha256, "encoder": encoder.config.weights_sha256})
    if not {HARMFUL, *config.outputs} <= set(encoder.outputs):
        raise WeightsError(root / CONFIG_FILE, f"outputs {config.outputs} are not the encoder's", CURE)
    return CascadeClassifier(config, ngram, encoder)


def _check_parts(root: Path, config: CascadeConfig, found: Mapping[str, str]) -> None:
    for name, expected in (("ngram", config.ngram_sha256), ("encoder", config.encoder_sha256)):
        if found[name] != expected:
            raise WeightsError(
                root / name, f"weights {found[name][:12]}, the cascade was made with {expected[:12]}", CURE
            )


def _sigmoid(x: float) -> float:
    return float(1.0 / (1.0 + np.exp(-np.clip(x, -SATURATED, SATURATED))))
