"""Trains the shipped classifier: rows, n-grams, encoder, cascade, thresholds, report, and a weights directory.

Called by `causerie train moderation`. Test files are only reported on; dev calibrates, and the validation files'
ordinary first turns choose the thresholds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save as save_safetensors

from moderation.calibrate import (
    FALSE_POSITIVE_RATES,
    choose_output_limits,
    choose_sure_below,
    choose_thresholds,
    fit_blends,
    fit_ngram_line,
    held_out_rows,
)
from moderation.card import StageFacts
from moderation.cascade import ENCODER_FOLDER, NGRAM_FOLDER, CascadeClassifier, CascadeConfig, Limits, load_classifier
from moderation.classifier import NgramClassifier, NgramConfig
from moderation.corpus import TRAINING_WINDOWS, Corpus, LicenceRule, collect_corpus, training_pieces, vocabulary_texts
from moderation.encoder import Encoder
from moderation.evaluate import evaluate_policy
from moderation.features import FeatureOptions
from moderation.gate import check_falls
from moderation.logistic import build_matrix, fit_logistic
from moderation.policy import Policy
from moderation.presets import LANGUAGES, PRESETS, Language, PresetName
from moderation.pretrained import find_trunk_file
from moderation.publish import MANIFEST_FILE, write_report
from moderation.readings import readings
from moderation.report import Report
from moderation.rows import DataFile
from moderation.targets import OUTPUTS, rows_by_category
from moderation.train_encoder import EncoderOptions, TrainedEncoder, train_encoder
from moderation.weight_files import CONFIG_FILE, TENSORS_FILE
from quant.model_directory import publish_directory
from quant.progress import ProgressSink

__all__ = [
    "MANIFEST_FILE",
    "NgramOptions",
    "TrainOptions",
    "WeightsManifest",
    "encode_ngram_weights",
    "train_moderation",
]

NGRAM_VERSION, VERSION = "2", "2"
# A category that fewer rows teach is not reported at all.
LEAST_CATEGORY_ROWS = 200
HARMFUL = OUTPUTS.index("harmful")


@dataclass(frozen=True, slots=True)
class NgramOptions:
    l2: float = 1e-6
    iterations: int = 100
    features: FeatureOptions = field(default_factory=FeatureOptions)


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """rows_per_line: how many rows a line of our own phrases gives at most.

    encoder:    None trains n-grams alone
    trunk:      file of the pretrained trunk; None takes the installed package's
    checkpoint: where the encoder's training is kept; None puts it beside `out`
    """

    data: Path
    out: Path
    licences: LicenceRule = "yes"
    seed: int = 0
    rows_per_line: int = 12
    passages: int = 1000
    ngram: NgramOptions = NgramOptions()
    encoder: EncoderOptions | None = field(default_factory=EncoderOptions)
    trunk: Path | None = None
    checkpoint: Path | None = None
    accept_falls: bool = False


@dataclass(frozen=True, slots=True)
class WeightsManifest:
    """Where the weights came from; holds names and hashes, no path. The model card takes its facts from here."""

    stage: str
    model: str
    licences: str
    seed: int
    command: str
    options: dict[str, object]
    trunk_sha256: str | None
    files: list[DataFile]
    rows: int
    rows_by_source_and_label: dict[str, int]
    rows_by_category: dict[str, int]
    removed_rows_known_from_validation_or_test: dict[str, int]
    trained_categories: list[str]
    stages: list[StageFacts]
    weights_sha256: dict[str, str]


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
    """Writes weights, manifest, report and model card to `options.out`, whole or not at all.

    Raises ModerationError if weights there would be replaced by ones that fall on a test file.
    """
    corpus = collect_corpus(options.data, options.licences, options.rows_per_line, options.passages, options.seed)
    ngram = _train_ngram(corpus, options, progress)
    encoder = _train_encoder(corpus, options, progress)
    with publish_directory(options.out) as directory:
        _write_parts(directory, ngram, encoder, corpus, options)
        _write_manifest(directory, corpus, options)
        policy = Policy(load_classifier(directory), readings=readings)
        report = evaluate_policy(policy, options.data, progress)
        check_falls(options.out, report, accept_falls=options.accept_falls)
        write_report(report, directory, directory)
    return report


def _train_ngram(corpus: Corpus, options: TrainOptions, progress: ProgressSink) -> NgramClassifier:
    """Fitted and calibrated by itself; its threshold is for use without an encoder."""
    features = options.ngram.features
    pieces = [(piece, row) for row in corpus.rows for piece in training_pieces(row, TRAINING_WINDOWS)]
    matrix = build_matrix([piece for piece, _ in pieces], features, progress)
    weights, bias = fit_logistic(
        matrix,
        np.array([row.label for _, row in pieces], np.float64),
        np.array([SOURCE_WEIGHTS.get(row.source, 1.0) for _, row in pieces], np.float64),
        bucket_bits=features.bucket_bits,
        l2=options.ngram.l2,
        iterations=options.ngram.iterations,
        progress=progress,
    )
    stored = weights.astype(np.float16)
    config = NgramConfig(
        NGRAM_VERSION, features, bias, 1.0, 0.0, 0.5, hashlib.sha256(encode_ngram_weights(stored)).hexdigest()
    )
    raw = NgramClassifier(config, stored.astype(np.float32))
    rows = held_out_rows(options.data, options.licences)
    slope, intercept = fit_ngram_line(raw, rows)
    calibrated = raw.with_config(replace(config, slope=slope, intercept=intercept))
    thresholds = choose_thresholds(Policy(calibrated, readings=readings), options.data)["balanced"]
    return calibrated.with_config(replace(calibrated.config, threshold=max(thresholds.values())))


def _train_encoder(corpus: Corpus, options: TrainOptions, progress: ProgressSink) -> TrainedEncoder | None:
    if options.encoder is None:
        return None
    checkpoint = options.checkpoint or options.out.with_name(f"{options.out.name}.encoder-checkpoint.safetensors")
    texts = vocabulary_texts(options.data, corpus, options.licences)
    trunk = options.trunk or find_trunk_file()
    return train_encoder(corpus.rows, texts, trunk, options.encoder, checkpoint, VERSION, progress)


def _write_parts(
    directory: Path, ngram: NgramClassifier, trained: TrainedEncoder | None, corpus: Corpus, options: TrainOptions
) -> None:
    """The n-grams alone, or both parts and the cascade over them."""
    if trained is None:
        _write_ngram(ngram, directory)
        return
    _write_ngram(ngram, directory / NGRAM_FOLDER)
    trained.write(directory / ENCODER_FOLDER)
    encoder = Encoder.load(directory / ENCODER_FOLDER)
    rows = held_out_rows(options.data, options.licences)
    undecided: dict[PresetName, dict[Language, float]] = {p: dict.fromkeys(LANGUAGES, 0.5) for p in PRESETS}
    config = CascadeConfig(
        version=VERSION,
        blends=fit_blends(ngram, encoder, rows, HARMFUL),
        input=Limits(choose_sure_below(ngram, rows), undecided),
        output=Limits(0.0, undecided),
        outputs=reported_outputs(rows_by_category(corpus.rows)),
        ngram_sha256=ngram.config.weights_sha256,
        encoder_sha256=encoder.config.weights_sha256,
    )
    _write_json(directory / CONFIG_FILE, with_limits(CascadeClassifier(config, ngram, encoder), options.data))


def with_limits(cascade: CascadeClassifier, data: Path) -> CascadeConfig:
    """The cascade's configuration with thresholds for both directions, and what its encoder reads of answers."""
    thresholds = choose_thresholds(Policy(cascade, readings=readings), data)
    output = choose_output_limits(cascade, data)
    return replace(cascade.config, input=replace(cascade.config.input, thresholds=thresholds), output=output)


def reported_outputs(rows: Mapping[str, int]) -> tuple[str, ...]:
    """Outputs besides the decision that at least LEAST_CATEGORY_ROWS rows teach."""
    return tuple(name for name in OUTPUTS[1:] if rows.get(name, 0) >= LEAST_CATEGORY_ROWS)


def _write_ngram(ngram: NgramClassifier, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    (directory / TENSORS_FILE).write_bytes(encode_ngram_weights(ngram.weights.astype(np.float16)))
    _write_json(directory / CONFIG_FILE, ngram.config)


def _write_manifest(directory: Path, corpus: Corpus, options: TrainOptions) -> None:
    classifier = load_classifier(directory)
    trunk = options.trunk or find_trunk_file() if options.encoder is not None else None
    manifest = WeightsManifest(
        stage="moderation",
        model=f"{classifier.name}-{classifier.version}",
        licences=options.licences,
        seed=options.seed,
        command="causerie train moderation",
        options=_recorded(options),
        trunk_sha256=None if trunk is None else hashlib.sha256(trunk.read_bytes()).hexdigest(),
        files=corpus.files,
        rows=len(corpus.rows),
        rows_by_source_and_label=corpus.counts(),
        rows_by_category=rows_by_category(corpus.rows),
        removed_rows_known_from_validation_or_test=corpus.removed,
        trained_categories=[category.value for category in classifier.trained_categories]
        + list(classifier.trained_extensions),
        stages=list(_stages(directory, options)),
        weights_sha256={
            str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(directory.rglob(TENSORS_FILE))
        },
    )
    _write_json(directory / MANIFEST_FILE, manifest)


def _recorded(options: TrainOptions) -> dict[str, object]:
    return {
        "rows_per_line": options.rows_per_line,
        "passages": options.passages,
        "ngram": asdict(options.ngram),
        "encoder": None if options.encoder is None else asdict(options.encoder),
        "false_positive_rates": dict(FALSE_POSITIVE_RATES),
    }


def _stages(directory: Path, options: TrainOptions) -> Iterable[StageFacts]:
    buckets = options.ngram.features.bucket_bits
    yield StageFacts(
        "n-grams",
        f"logistic regression over hashed word and character n-grams, 2^{buckets} float16 weights; "
        "passes at once what is surely harmless",
        (directory / NGRAM_FOLDER if options.encoder is not None else directory).joinpath(TENSORS_FILE).stat().st_size,
    )
    if options.encoder is not None:
        folder = directory / ENCODER_FOLDER
        yield StageFacts(
            "encoder",
            f"the first {options.encoder.layers} layers of multilingual-e5-small (MIT licence), fine-tuned; 8-bit "
            "matrices, 4-bit word embeddings for English and Chinese; reads whatever the n-grams leave open",
            sum(path.stat().st_size for path in folder.iterdir()),
        )


def _write_json(path: Path, record: object) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")


def encode_ngram_weights(weights: npt.NDArray[np.float16]) -> bytes:
    return save_safetensors({"weights": weights})
