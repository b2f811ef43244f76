"""Trains the n-gram classifier: rows, weights, calibration, threshold, report, and a weights directory at the end.

Called by `causerie train moderation`. Test files are only reported on; dev calibrates, dev's and the validation files'
ordinary requests choose the threshold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save as save_safetensors

from moderation.card import render_card
from moderation.classifier import NgramClassifier, NgramConfig
from moderation.corpus import (
    DEV_FILE,
    MEANT_AS_HARMFUL,
    VALIDATION_FILES,
    Corpus,
    LicenceRule,
    collect_corpus,
    training_pieces,
)
from moderation.errors import ModerationError
from moderation.evaluate import Report, evaluate_policy
from moderation.features import FeatureOptions
from moderation.logistic import build_matrix, fit_logistic, fit_platt
from moderation.policy import Policy, WindowOptions
from moderation.rows import DataFile, Row, conversations, labelled_rows, read_licences
from moderation.weight_files import CONFIG_FILE, TENSORS_FILE
from quant.model_directory import publish_directory
from quant.progress import ProgressSink

__all__ = ["CARD_FILE", "MANIFEST_FILE", "REPORT_FILE", "TrainOptions", "WeightsManifest", "train_moderation"]

MANIFEST_FILE = "manifest.json"
REPORT_FILE = "report.json"
CARD_FILE = "README.md"
VERSION = "1"


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """`max_false_positive_rate`: share of ordinary first turns that may be flagged, in each validation file."""

    data: Path
    out: Path
    licences: LicenceRule = "yes"
    seed: int = 0
    rows_per_line: int = 50
    passages: int = 1500
    l2: float = 1e-6
    iterations: int = 100
    max_false_positive_rate: float = 0.005
    features: FeatureOptions = field(default_factory=FeatureOptions)


@dataclass(frozen=True, slots=True)
class WeightsManifest:
    """Where the weights came from; holds names and hashes, no path."""

    stage: str
    model: str
    licences: str
    seed: int
    options: dict[str, float]
    files: list[DataFile]
    rows: int
    rows_by_source_and_label: dict[str, int]
    removed_rows_known_from_validation_or_test: dict[str, int]
    weights_sha256: str


# The large sources of tweets and posts would otherwise outweigh the requests, which is what a chat receives.
SOURCE_WEIGHTS: Mapping[str, float] = {
    "cold": 0.4,
    "davidson_tweets": 0.6,
    "advbench": 2.0,
    "harmbench": 2.0,
    "strongreject": 2.0,
    "dangerousqa": 2.0,
}


def train_moderation(options: TrainOptions, progress: ProgressSink) -> Report:
    """Writes config, weights, manifest, report and model card to `options.out`, whole or not at all."""
    corpus = collect_corpus(options.data, options.licences, options.rows_per_line, options.passages, options.seed)
    raw = _fit(corpus, options, progress)
    calibrated = _calibrate(raw, options)
    classifier = _with_threshold(calibrated, options)
    report = evaluate_policy(Policy(classifier), options.data, progress)
    manifest = _manifest(corpus, classifier, options)
    _publish(classifier, manifest, report, options.out)
    return report


def _fit(corpus: Corpus, options: TrainOptions, progress: ProgressSink) -> NgramClassifier:
    features = options.features
    windows = WindowOptions()
    pieces = [(piece, row) for row in corpus.rows for piece in training_pieces(row, windows)]
    matrix = build_matrix([piece for piece, _ in pieces], features, progress)
    weights, bias = fit_logistic(
        matrix,
        np.array([row.label for _, row in pieces], np.float64),
        np.array([SOURCE_WEIGHTS.get(row.source, 1.0) for _, row in pieces], np.float64),
        bucket_bits=features.bucket_bits,
        l2=options.l2,
        iterations=options.iterations,
        progress=progress,
    )
    stored = weights.astype(np.float16)
    config = NgramConfig(VERSION, features, bias, 1.0, 0.0, 0.5, hashlib.sha256(_encode(stored)).hexdigest())
    return NgramClassifier(config, stored.astype(np.float32))


def _calibrate(classifier: NgramClassifier, options: TrainOptions) -> NgramClassifier:
    """Platt's line on dev and the ordinary first turns of the validation files, none of which was trained on."""
    allowed = read_licences(options.data)
    dev, _ = labelled_rows(options.data, DEV_FILE)
    rows = [row for row in dev if options.licences == "all" or allowed.allow(row.source)]
    rows += [row for name in VALIDATION_FILES for row in _ordinary_first_turns(options.data, name)]
    logits = np.array([classifier.logit(row.text) for row in rows], np.float64)
    slope, intercept = fit_platt(logits, np.array([row.label for row in rows], np.float64))
    return classifier.with_config(replace(classifier.config, slope=slope, intercept=intercept))


def _with_threshold(classifier: NgramClassifier, options: TrainOptions) -> NgramClassifier:
    policy = Policy(classifier)
    thresholds: list[float] = []
    for name in VALIDATION_FILES:
        turns = [row.text for row in _ordinary_first_turns(options.data, name)]
        probabilities = np.array([verdict.probability for verdict in policy.judge_texts(turns)], np.float64)
        thresholds.append(lowest_threshold(probabilities, options.max_false_positive_rate))
    return classifier.with_config(replace(classifier.config, threshold=max(thresholds)))


def lowest_threshold(probabilities: npt.NDArray[np.float64], max_rate: float) -> float:
    """The threshold at which at most `max_rate` of these are flagged, halfway between the last flagged and the next."""
    if len(probabilities) == 0:
        raise ModerationError("no ordinary request to choose the threshold by; expected first turns to validate on")
    ordered = np.sort(probabilities)[::-1]
    allowed = int(max_rate * len(ordered))
    above = ordered[allowed - 1] if allowed > 0 else 1.0
    threshold = float((above + ordered[allowed]) / 2.0)
    # Equal scores on both sides would all be flagged; step just above them.
    return threshold if threshold > ordered[allowed] else float(np.nextafter(ordered[allowed], 2.0))


def _ordinary_first_turns(data: Path, name: str) -> list[Row]:
    return [
        Row(turns[0].content, 0, "", source)
        for source, turns in conversations(data, name)
        if source not in MEANT_AS_HARMFUL
    ]


def _manifest(corpus: Corpus, classifier: NgramClassifier, options: TrainOptions) -> WeightsManifest:
    return WeightsManifest(
        stage="moderation",
        model=f"{classifier.name}-{classifier.version}",
        licences=options.licences,
        seed=options.seed,
        options={
            "rows_per_line": options.rows_per_line,
            "passages": options.passages,
            "l2": options.l2,
            "iterations": options.iterations,
            "max_false_positive_rate": options.max_false_positive_rate,
        },
        files=corpus.files,
        rows=len(corpus.rows),
        rows_by_source_and_label=corpus.counts(),
        removed_rows_known_from_validation_or_test=corpus.removed,
        weights_sha256=classifier.config.weights_sha256,
    )


def _publish(classifier: NgramClassifier, manifest: WeightsManifest, report: Report, out: Path) -> None:
    with publish_directory(out) as directory:
        (directory / TENSORS_FILE).write_bytes(_encode(classifier.weights.astype(np.float16)))
        for name, record in ((CONFIG_FILE, classifier.config), (MANIFEST_FILE, manifest), (REPORT_FILE, report)):
            (directory / name).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
        (directory / CARD_FILE).write_text(render_card(manifest, report), encoding="utf-8")
        NgramClassifier.load(directory)


def _encode(weights: npt.NDArray[np.float16]) -> bytes:
    return save_safetensors({"weights": weights})
