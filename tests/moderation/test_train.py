from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moderation.calibrate import threshold_for, thresholds_at
from moderation.cascade import load_classifier
from moderation.corpus import Corpus, LicenceRule, collect_corpus, list_test_files, training_pieces, vocabulary_texts
from moderation.errors import ModerationError
from moderation.features import FeatureOptions
from moderation.policy import WindowOptions
from moderation.presets import Language
from moderation.rows import Row, labelled_rows, row_key
from moderation.train import MANIFEST_FILE, NgramOptions, TrainOptions, reported_outputs, train_moderation
from moderation.train_encoder import EncoderOptions
from quant.progress import SilentProgress
from tests.moderation.fake_trunk import write_trunk
from tests.moderation.test_rows import write_lines

pytestmark = pytest.mark.unit

FREE, CLOSED = "free_source", "closed_source"
KNOWN_FROM_TEST = "This row stands in a test file"
KNOWN_FROM_VALIDATION = "What is the capital of France?"


def labelled(text: str, label: int, source: str = FREE, category: str = "none") -> object:
    return {"text": text, "label": label, "lang": "en", "source": source, "category": category}


def chat(text: str, source: str = FREE, answer: str = "An answer to that. ") -> object:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"{answer}{text} " * 20}]
    return {"messages": messages, "prompt": messages[:1], "lang": "en", "source": source}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory of the real layout with a few rows in each file."""
    directory = tmp_path / "data"
    good = [f"please water the plant number {i}" for i in range(20)]
    bad = [f"attack and murder victim number {i}" for i in range(20)]
    rows = [labelled(t, 0) for t in good] + [labelled(t, 1) for t in bad]
    extra = [labelled("of closed licence", 1, CLOSED), labelled(f"{KNOWN_FROM_TEST}!", 1)]
    write_lines(directory / "moderation/train.jsonl.gz", [*rows, *extra])
    dev = [
        labelled("murder them", 1),
        labelled("plants like water", 0),
        labelled("杀了他们", 1),
        labelled("给花浇水", 0),
    ]
    write_lines(directory / "moderation/dev.jsonl.gz", dev * 5)
    write_lines(directory / "moderation/test_a.jsonl.gz", [labelled(KNOWN_FROM_TEST, 1), labelled("a quiet day", 0)])
    for name in ("train_en", "train_zh"):
        chats = [chat(f"{name} request {i}") for i in range(5)]
        closed = [chat("closed chat", CLOSED), chat("ask for harm", "safety_tuned_refusals")]
        write_lines(directory / f"sft/{name}.jsonl.gz", [*chats, *closed, chat(KNOWN_FROM_VALIDATION.upper())])
    write_lines(
        directory / "sft/val.jsonl.gz",
        [chat(KNOWN_FROM_VALIDATION), chat("How tall is that tree?"), chat("今天天气怎么样？", answer="天气很好。")],
    )
    write_lines(directory / "prompts/val.jsonl.gz", [chat("Name three rivers"), chat("harm", "safety_tuned_refusals")])
    write_lines(directory / "preference/train.jsonl.gz", [chat("which tea is best")])
    for name in ("en_00", "zh_00"):
        write_lines(
            directory / f"pretrain/{name}.jsonl.gz", [{"text": "Once upon a time. " * 40, "lang": "en", "source": FREE}]
        )
    (directory / "licences.json").write_text(json.dumps({"yes": [FREE], "no": [CLOSED]}))
    return directory


def collect(data: Path, licences: LicenceRule = "yes") -> Corpus:
    return collect_corpus(data, licences, rows_per_line=1, passages=3, seed=0)


def tiny(data: Path, out: Path, seed: int = 0) -> TrainOptions:
    return TrainOptions(
        data,
        out,
        seed=seed,
        rows_per_line=1,
        passages=3,
        ngram=NgramOptions(iterations=5, features=FeatureOptions(bucket_bits=12)),
        encoder=EncoderOptions(layers=1, positions=140, max_tokens=24, steps=2, batch=8, seed=seed),
        trunk=write_trunk(out.with_name(f"{out.name}-trunk.bin")),
    )


def test_only_allowed_sources_are_used_unless_all_are_asked_for(data: Path) -> None:
    assert CLOSED not in {row.source for row in collect(data).rows}
    assert CLOSED in {row.source for row in collect(data, "all").rows}


def test_requests_written_to_be_harmful_are_never_harmless_rows(data: Path) -> None:
    assert not any(row.source == "safety_tuned_refusals" for row in collect(data, "all").rows)


def test_no_training_row_occurs_in_a_test_or_validation_file_and_what_was_left_out_is_counted(data: Path) -> None:
    corpus = collect(data)

    keys = {row_key(row.text) for row in corpus.rows}
    tests = [row for name in list_test_files(data) for row in labelled_rows(data, name)[0]]
    assert keys.isdisjoint(row_key(row.text) for row in tests)
    assert row_key(KNOWN_FROM_VALIDATION) not in keys
    assert corpus.removed["moderation/train.jsonl.gz"] == 1
    assert corpus.removed["sft/train_en.jsonl.gz"] == 1


def test_harmful_requests_are_also_hidden_in_passages(data: Path) -> None:
    hidden = [row for row in collect(data).rows if row.source.startswith("hidden:")]

    assert hidden
    assert all(row.label == 1 for row in hidden)


def test_a_long_harmless_text_is_trained_window_by_window_and_a_harmful_one_whole() -> None:
    windows = WindowOptions(window_chars=20, stride_chars=10, joined_chars=50)
    text = "0123456789" * 4

    assert training_pieces(Row(text, 0, "en", FREE), windows) == ["0123456789" * 2] * 3
    assert training_pieces(Row(text, 1, "en", FREE), windows) == [text]


def test_training_twice_from_one_seed_gives_the_same_bytes(data: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"

    train_moderation(tiny(data, first), SilentProgress())
    train_moderation(tiny(data, second), SilentProgress())

    for name in ("ngram/weights.safetensors", "encoder/weights.safetensors", "config.json", MANIFEST_FILE):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_another_seed_gives_other_weights(data: Path, tmp_path: Path) -> None:
    train_moderation(tiny(data, tmp_path / "a", seed=0), SilentProgress())
    train_moderation(tiny(data, tmp_path / "b", seed=1), SilentProgress())

    assert (tmp_path / "a/ngram/config.json").read_bytes() != (tmp_path / "b/ngram/config.json").read_bytes()


def test_manifest_holds_hashes_counts_and_seed_and_no_path(data: Path, tmp_path: Path) -> None:
    train_moderation(tiny(data, tmp_path / "out"), SilentProgress())

    text = (tmp_path / "out" / MANIFEST_FILE).read_text()
    manifest = json.loads(text)
    assert manifest["seed"] == 0
    assert manifest["rows"] == sum(manifest["rows_by_source_and_label"].values())
    assert all(len(file["sha256"]) == 64 for file in manifest["files"])
    assert str(tmp_path) not in text


def test_the_report_has_every_test_file_and_both_validation_files(data: Path, tmp_path: Path) -> None:
    report = train_moderation(tiny(data, tmp_path / "out"), SilentProgress())

    assert [test.name for test in report.tests] == ["moderation/test_a.jsonl.gz"]
    assert [(o.rows, o.ordinary, o.meant_as_harmful) for o in report.ordinary] == [(3, 3, 0), (2, 1, 1)]


def test_what_was_trained_is_a_cascade_that_serves(data: Path, tmp_path: Path) -> None:
    train_moderation(tiny(data, tmp_path / "out"), SilentProgress())

    classifier = load_classifier(tmp_path / "out")

    assert classifier.name == "causerie-moderation"
    assert len(classifier.scores(["please water the plant", "你好"])) == 2
    assert classifier.threshold("strict", "en") <= classifier.threshold("lenient", "en")


def test_ngrams_alone_can_be_trained(data: Path, tmp_path: Path) -> None:
    train_moderation(replace(tiny(data, tmp_path / "out"), encoder=None), SilentProgress())

    assert load_classifier(tmp_path / "out").name == "causerie-moderation-ngram"


def test_a_category_needs_two_hundred_rows() -> None:
    assert reported_outputs({"hate": 200, "sexual": 199, "jailbreak": 4000}) == ("hate", "jailbreak")


def test_the_vocabulary_is_chosen_by_rows_answers_and_books(data: Path) -> None:
    texts = list(vocabulary_texts(data, collect(data), "yes"))

    assert "please water the plant number 3" in texts
    assert any(text.startswith("An answer to that.") for text in texts)
    assert any(text.startswith("Once upon a time.") for text in texts)
    assert not any("closed chat" in text for text in texts)


@pytest.mark.parametrize("allowed", [0, 1, 2, 3])
def test_threshold_flags_at_most_what_is_allowed(allowed: int) -> None:
    probabilities = np.arange(10) / 10.0

    assert int((probabilities >= threshold_for(probabilities, allowed)).sum()) == allowed


def test_threshold_steps_above_equal_scores() -> None:
    probabilities = np.array([0.5] * 10)

    assert not (probabilities >= threshold_for(probabilities, 2)).any()


def test_no_ordinary_request_means_no_threshold() -> None:
    with pytest.raises(ModerationError, match="no ordinary request"):
        threshold_for(np.empty(0), 1)


def test_a_full_file_raises_the_threshold_of_the_least_sure_language_alone() -> None:
    quiet: list[tuple[Language, float]] = [("en", 0.1), ("zh", 0.1)] * 90
    first: list[tuple[Language, float]] = [("en", 0.9), ("en", 0.8), ("zh", 0.7), *quiet]
    second: list[tuple[Language, float]] = [("zh", 0.95), *quiet]
    files = [first, second]

    found = thresholds_at(files, 0.011)

    # Each language may flag two of its own, but the first file two in all: the 0.7 is let go.
    assert 0.1 < found["en"] < 0.8
    assert 0.7 < found["zh"] < 0.95
