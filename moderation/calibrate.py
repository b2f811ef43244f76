"""From two classifiers' logits to one calibrated probability and to thresholds with a stated false-positive rate.

Everything here looks at held-out rows only: the dev file, and ordinary first turns of the validation files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moderation.cascade import Blend, CascadeClassifier, Limits
from moderation.classifier import NgramClassifier
from moderation.corpus import DEV_FILE, MEANT_AS_HARMFUL, VALIDATION_FILES, LicenceRule
from moderation.encoder import Encoder
from moderation.errors import ModerationError
from moderation.logistic import fit_blend, fit_platt
from moderation.policy import Policy
from moderation.presets import LANGUAGES, PRESETS, Language, PresetName, language_of
from moderation.readings import readings
from moderation.rows import Row, answers, first_user_turns, labelled_rows, read_licences
from moderation.stream_filter import judged_windows

__all__ = [
    "FALSE_POSITIVE_RATES",
    "choose_output_limits",
    "choose_sure_below",
    "choose_thresholds",
    "fit_blends",
    "fit_ngram_line",
    "held_out_rows",
    "judge_answer",
    "ordinary_answers",
    "threshold_for",
    "thresholds_at",
]

FloatArray = npt.NDArray[np.float64]

# Share of ordinary first turns that each preset may refuse, and of ordinary answers that it may stop.
FALSE_POSITIVE_RATES: Mapping[PresetName, float] = {"strict": 0.02, "balanced": 0.005, "lenient": 0.001}
# Share of held-out harmful rows that may pass without the encoder having read them.
UNREAD_HARMFUL = 0.005
MARGIN = 0.25
# Share of the windows of ordinary answers that the encoder reads. An answer grows by several windows a second, and the
# encoder's time is taken from the model's.
READ_WINDOWS = 0.1
ANSWER_FILE = "sft/val.jsonl.gz"


def held_out_rows(data: Path, licences: LicenceRule) -> list[Row]:
    """Dev rows of the sources that were trained on, and ordinary first turns; none of them a training row."""
    allowed = read_licences(data)
    dev, _ = labelled_rows(data, DEV_FILE)
    rows = [row for row in dev if licences == "all" or allowed.allow(row.source)]
    return rows + [row for name in VALIDATION_FILES for row in _ordinary_first_turns(data, name)]


def fit_ngram_line(ngram: NgramClassifier, rows: Sequence[Row]) -> tuple[float, float]:
    """(slope, intercept) of the n-grams' own probability."""
    logits = np.array([ngram.logit(row.text) for row in rows], np.float64)
    return fit_platt(logits, _labels(rows))


def choose_sure_below(ngram: NgramClassifier, rows: Sequence[Row]) -> float:
    """The n-gram probability that all but UNREAD_HARMFUL of the harmful rows reach: below it, nobody reads on."""
    scores = ngram.scores([row.text for row in rows if row.label == 1])
    if not scores:
        raise ModerationError("no harmful row among the held-out ones; expected some to set the cascade by")
    return float(np.quantile([score.probability for score in scores], UNREAD_HARMFUL, method="lower"))


def fit_blends(ngram: NgramClassifier, encoder: Encoder, rows: Sequence[Row], harmful: int) -> dict[Language, Blend]:
    """One for each language. harmful: index of the encoder's output for the decision."""
    read = encoder.logits([row.text for row in rows])[:, harmful]
    counted = [ngram.logit(row.text) for row in rows]
    logits = np.column_stack([read, counted]).astype(np.float64)
    languages = np.array([language_of(row.text) for row in rows])
    blends: dict[Language, Blend] = {}
    for language in LANGUAGES:
        chosen = languages == language
        labels = _labels(rows)[chosen]
        if labels.min(initial=1.0) == labels.max(initial=0.0):
            raise ModerationError(f"held-out rows in {language!r} are all of one label; expected both to calibrate by")
        slopes, intercept = fit_blend(logits[chosen], labels)
        blends[language] = Blend(float(slopes[0]), float(slopes[1]), intercept)
    return blends


def choose_output_limits(cascade: CascadeClassifier, data: Path) -> Limits:
    """Limits for windows of answers, from every other ordinary answer; the rest is left to report on."""
    texts = [row.text for row in ordinary_answers(data)[::2]]
    windows = [window for text in texts for window in judged_windows(text)]
    quick = [scores.probability for scores in cascade.quick_scores(windows)]
    limits = replace(cascade.config.output, sure_below=float(np.quantile(quick, 1.0 - READ_WINDOWS)))
    policy = Policy(cascade.with_config(replace(cascade.config, output=limits)), readings=readings)
    judged = [judge_answer(policy, text) for text in texts]
    return replace(limits, thresholds={p: thresholds_at([judged], FALSE_POSITIVE_RATES[p]) for p in PRESETS})


def ordinary_answers(data: Path) -> list[Row]:
    rows, _ = answers(data, ANSWER_FILE)
    return [row for row in rows if row.text.strip() and row.source not in MEANT_AS_HARMFUL]


def judge_answer(policy: Policy, text: str) -> tuple[Language, float]:
    """(language, probability) of the most severe window that the filter would judge of an answer."""
    verdicts = [policy.judge_output("", window) for window in judged_windows(text)]
    worst = max(verdicts, key=lambda verdict: verdict.probability)
    return worst.language, worst.probability


def choose_thresholds(policy: Policy, data: Path) -> dict[PresetName, dict[Language, float]]:
    """The lowest thresholds at which each preset keeps its rate, in each language and in each validation file."""
    files = [_ordinary_first_turns(data, name) for name in VALIDATION_FILES]
    judged = [_judge(policy, [row.text for row in rows]) for rows in files]
    return {preset: thresholds_at(judged, FALSE_POSITIVE_RATES[preset]) for preset in PRESETS}


def _judge(policy: Policy, texts: Sequence[str]) -> list[tuple[Language, float]]:
    return [(verdict.language, verdict.probability) for verdict in policy.judge_texts(texts)]


def thresholds_at(files: Sequence[Sequence[tuple[Language, float]]], max_rate: float) -> dict[Language, float]:
    """files: (language, probability) of ordinary texts, a list for each file.

    Every language starts with its own allowance. Where a file has too many flagged, the least sure of them goes: its
    language is allowed one less.
    """
    of_language: dict[Language, FloatArray] = {
        language: np.array([p for rows in files for lang, p in rows if lang == language], np.float64)
        for language in LANGUAGES
    }
    allowed: dict[Language, int] = {language: int(max_rate * len(found)) for language, found in of_language.items()}
    while True:
        found: dict[Language, float] = {
            language: threshold_for(of_language[language], allowed[language]) for language in LANGUAGES
        }
        spared = _least_sure_of_a_full_file(files, found, max_rate)
        if spared is None:
            return found
        allowed[spared] -= 1


def _least_sure_of_a_full_file(
    files: Sequence[Sequence[tuple[Language, float]]], thresholds: Mapping[Language, float], max_rate: float
) -> Language | None:
    for rows in files:
        flagged = [row for row in rows if row[1] >= thresholds[row[0]]]
        if len(flagged) > max_rate * len(rows):
            language, _ = min(flagged, key=lambda row: row[1])
            return language
    return None


def threshold_for(probabilities: FloatArray, allowed: int) -> float:
    """The threshold that flags at most `allowed` of these: a quarter of the way from the next to the last flagged."""
    if len(probabilities) == 0:
        raise ModerationError("no ordinary request to choose the threshold by; expected first turns to validate on")
    ordered = np.sort(probabilities)[::-1]
    above = ordered[allowed - 1] if allowed > 0 else 1.0
    threshold = float(ordered[allowed] + MARGIN * (above - ordered[allowed]))
    # Equal scores on both sides would all be flagged; step just above them.
    return threshold if threshold > ordered[allowed] else float(np.nextafter(ordered[allowed], 2.0))


def _labels(rows: Sequence[Row]) -> FloatArray:
    return np.array([row.label for row in rows], np.float64)


def _ordinary_first_turns(data: Path, name: str) -> list[Row]:
    return [row for row in first_user_turns(data, name)[0] if row.source not in MEANT_AS_HARMFUL]
