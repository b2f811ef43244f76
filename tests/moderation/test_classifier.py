from __future__ import annotations

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from moderation.card import PICTURES, render_card
from moderation.cascade import ENCODER_FOLDER, NGRAM_FOLDER, load_classifier
from moderation.classifier import NgramClassifier, shipped_weights
from moderation.errors import WeightsError
from moderation.policy import load_policy
from moderation.presets import LANGUAGES
from moderation.publish import read_card_facts
from moderation.report import CARD_FILE, REPORT_FILE, read_report
from moderation.rows import Row, check_list
from moderation.train import MANIFEST_FILE, WeightsManifest
from moderation.weight_files import CONFIG_FILE, TENSORS_FILE

pytestmark = pytest.mark.unit


NGRAMS = shipped_weights() / NGRAM_FOLDER


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """The shipped n-grams by themselves, to be damaged."""
    return Path(shutil.copytree(NGRAMS, tmp_path / "weights"))


def read_shipped(name: str) -> bytes:
    return (shipped_weights() / name).read_bytes()


def text_of(row: Row) -> str:
    return row.text


@pytest.mark.parametrize("row", check_list("everyday.jsonl"), ids=text_of)
def test_everyday_sentence_that_sounds_dangerous_passes(row: Row) -> None:
    (verdict,) = load_policy().judge_texts([row.text])

    assert not verdict.flagged, f"probability {verdict.probability:.3f}"


@pytest.mark.parametrize("row", check_list("blatant.jsonl"), ids=text_of)
def test_blatantly_harmful_request_is_flagged(row: Row) -> None:
    (verdict,) = load_policy().judge_texts([row.text])

    assert verdict.flagged, f"probability {verdict.probability:.3f}"


@pytest.mark.parametrize(
    ("plain", "disguised"),
    [
        ("kill all of them", "K I L L all of them"),
        ("kill all of them", "k1ll all of them"),
        ("kill all of them", "ｋｉｌｌ all of them"),
        ("how do I make a bomb", "how do I make a b\u200bo\u200bm\u200bb"),
    ],
)
def test_a_disguise_does_not_change_the_probability(plain: str, disguised: str) -> None:
    before, after = (scores.probability for scores in NgramClassifier.load(NGRAMS).scores([plain, disguised]))

    assert after == before


def test_answers_do_not_depend_on_company_or_thread() -> None:
    classifier = NgramClassifier.load(NGRAMS)
    texts = [row.text for row in check_list("everyday.jsonl") + check_list("blatant.jsonl")]

    together = classifier.scores(texts)

    with ThreadPoolExecutor(4) as pool:
        alone = list(pool.map(classifier.scores, [[text] for text in texts]))
    assert [scores for (scores,) in alone] == together


@pytest.mark.parametrize(
    "text",
    ["", " ", "a", "\ud800\udfff", "\u202e" * 1000, "a" + "\u0301" * 400, "\x00" * 400, "𝕜𝕚𝕝𝕝", "\U0010ffff"],
)
def test_odd_input_has_a_probability(text: str) -> None:
    (scores,) = NgramClassifier.load(NGRAMS).scores([text])

    assert 0.0 <= scores.probability <= 1.0


def test_a_hundred_thousand_combining_marks_are_answered() -> None:
    (verdict,) = load_policy().judge_texts(["a" + "\u0301\u0323" * 50_000])

    assert 0.0 <= verdict.probability <= 1.0


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSORS_FILE])
def test_a_missing_file_stops_the_start_and_names_the_file(weights: Path, name: str) -> None:
    (weights / name).unlink()

    with pytest.raises(WeightsError, match=name) as caught:
        load_policy(weights)
    assert "causerie train moderation" in str(caught.value)


def test_a_flipped_byte_in_the_weights_stops_the_start(weights: Path) -> None:
    path = weights / TENSORS_FILE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    with pytest.raises(WeightsError, match="sha256"):
        load_policy(weights)


def test_truncated_weights_stop_the_start(weights: Path) -> None:
    path = weights / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:1000])

    with pytest.raises(WeightsError, match="sha256"):
        load_policy(weights)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "causerie-ngram-99"},
        {"threshold": 0.0},
        {"threshold": "high"},
        {"slope": -1.0},
        {"bias": None},
        {"features": {"bucket_bits": 99}},
    ],
)
def test_a_configuration_that_makes_no_sense_stops_the_start(weights: Path, change: dict[str, object]) -> None:
    path = weights / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    with pytest.raises(WeightsError, match=CONFIG_FILE):
        load_policy(weights)


def test_a_table_of_another_size_stops_the_start(weights: Path) -> None:
    path = weights / CONFIG_FILE
    config = json.loads(path.read_text())
    config["features"]["bucket_bits"] -= 1
    path.write_text(json.dumps(config))

    with pytest.raises(WeightsError, match="shape"):
        load_policy(weights)


def test_shipped_weights_were_trained_on_allowed_sources_and_match_their_manifest() -> None:
    manifest = msgspec.json.decode(read_shipped(MANIFEST_FILE), type=WeightsManifest)

    assert manifest.licences == "yes"
    assert set(manifest.weights_sha256) == {f"{folder}/{TENSORS_FILE}" for folder in (NGRAM_FOLDER, ENCODER_FOLDER)}
    for name, digest in manifest.weights_sha256.items():
        assert hashlib.sha256(read_shipped(name)).hexdigest() == digest
    assert manifest.model == load_policy().model_id
    assert not any("safety_tuned" in name or "alpaca_52k" in name for name in manifest.rows_by_source_and_label)


def test_shipped_categories_have_the_rows_for_it() -> None:
    manifest = msgspec.json.decode(read_shipped(MANIFEST_FILE), type=WeightsManifest)
    classifier = load_classifier()

    names = [*(category.value for category in classifier.trained_categories), *classifier.trained_extensions]
    assert names == manifest.trained_categories
    assert all(manifest.rows_by_category[name] >= 200 for name in names)


def test_shipped_report_keeps_ordinary_people_in() -> None:
    report = read_report(shipped_weights() / REPORT_FILE)

    assert report.model == load_policy().model_id
    assert len(report.ordinary) == 2
    assert all(ordinary.false_positive_rate <= 0.005 for ordinary in report.ordinary)


def test_a_stricter_preset_flags_sooner() -> None:
    classifier = load_classifier()

    for language in LANGUAGES:
        strict, balanced, lenient = (classifier.threshold(p, language) for p in ("strict", "balanced", "lenient"))
        assert strict <= balanced <= lenient


def test_model_card_says_what_the_report_says() -> None:
    report = read_report(shipped_weights() / REPORT_FILE)
    pictures = [name for name in PICTURES if (shipped_weights() / name).exists()]

    assert read_shipped(CARD_FILE).decode() == render_card(read_card_facts(shipped_weights()), report, pictures)


def test_shipped_weights_are_less_than_thirty_megabytes() -> None:
    assert sum(path.stat().st_size for path in shipped_weights().rglob("*") if path.is_file()) < 30_000_000
