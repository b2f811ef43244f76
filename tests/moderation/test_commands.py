from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from moderation.categories import Category
from moderation.commands import moderate, report, train_moderation
from moderation.errors import ModerationError
from moderation.policy import load_policy
from moderation.presets import PRESETS, PresetName
from moderation.report import Report
from moderation.train import TrainOptions
from quant.progress import ProgressSink
from tests.moderation.tiny_data import write_tiny_data

pytestmark = pytest.mark.unit

HARMFUL = "Tell me how to build a bomb and kill people at a school"
HARMLESS = "how do I kill a Python process"


def give_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize(("text", "word"), [(HARMFUL, "flagged:"), (HARMLESS, "not flagged:")])
def test_verdict_goes_to_standard_output_and_the_exit_code_is_0(
    text: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moderate([text]) == 0

    printed = capsys.readouterr()
    assert printed.out.startswith(word)
    assert printed.err == ""


def test_json_is_one_object_with_every_category(capsys: pytest.CaptureFixture[str]) -> None:
    assert moderate([HARMFUL, "--json"]) == 0

    verdict = json.loads(capsys.readouterr().out)
    assert verdict["flagged"] is True
    assert verdict["probability"] >= verdict["threshold"]
    assert list(verdict["categories"]) == [category.value for category in Category]
    assert (verdict["reason"], verdict["language"]) == ("moderation", "en")
    assert set(verdict["trained_categories"]) <= set(verdict["categories"])


def test_a_file_and_standard_input_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(HARMFUL, encoding="utf-8")
    for arguments in (["--file", str(path)], ["-"], ["--file", "-"]):
        give_stdin(monkeypatch, HARMFUL.encode())
        assert moderate(arguments) == 0
        assert capsys.readouterr().out.startswith("flagged:")


def test_bytes_that_are_no_utf8_do_not_hide_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give_stdin(monkeypatch, b"\xff\xfe " + HARMFUL.encode())

    assert moderate(["-"]) == 0
    assert capsys.readouterr().out.startswith("flagged:")


@pytest.mark.parametrize("arguments", [[], ["a", "--file", "b"], ["a", "--threshold", "high"], ["a", "--nonsense"]])
def test_misuse_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        moderate(arguments)

    assert ended.value.code == 2
    assert "usage: causerie moderate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--file", "/nowhere/x.txt"], "cannot be read"),
        (["a", "--threshold", "3"], "must be above 0 and at most 1"),
        (["a", "--weights", "/nowhere"], "the file is missing"),
    ],
)
def test_failures_are_one_line(arguments: list[str], words: str) -> None:
    with pytest.raises(ModerationError, match=words) as caught:
        moderate(arguments)

    assert "\n" not in str(caught.value)


def test_training_without_a_data_directory_says_how_to_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAUSERIE_DATA", raising=False)

    with pytest.raises(ModerationError, match="--data DIR or the environment variable CAUSERIE_DATA"):
        train_moderation([])


def test_training_takes_the_data_directory_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CAUSERIE_DATA", str(tmp_path / "from-environment"))

    with pytest.raises(ModerationError, match="from-environment"):
        train_moderation(["--out", str(tmp_path / "out")])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_asked_for_and_its_threshold_is_used(
    preset: PresetName, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moderate([HARMLESS, "--preset", preset, "--json"]) == 0

    expected = load_policy().preset_threshold(preset, "en")
    assert json.loads(capsys.readouterr().out)["threshold"] == expected


def test_report_is_written_beside_nothing_but_where_it_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_tiny_data(tmp_path / "data"), tmp_path / "out"

    assert report(["--data", str(data), "--out", str(out)]) == 0

    printed = capsys.readouterr()
    assert {"README.md", "report.json", "pr_curves.png", "calibration.png"} <= {path.name for path in out.iterdir()}
    assert "moderation/test_openai_moderation.jsonl.gz: recall" in printed.out
    assert str(data) not in (out / "README.md").read_text(encoding="utf-8")
    assert "judging" in printed.err


def test_report_stops_before_judging_if_it_could_not_be_written(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()

    with pytest.raises(ModerationError, match=r"manifest\.json cannot be used"):
        report(["--data", str(tmp_path / "no-data"), "--weights", str(weights)])


def test_report_without_data_says_how_to_name_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CAUSERIE_DATA", raising=False)
    with pytest.raises(ModerationError, match="--data DIR or the environment variable CAUSERIE_DATA"):
        report([])
    with pytest.raises(ModerationError, match="cannot be read"):
        report(["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path)])


def test_training_options_reach_the_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[TrainOptions] = []

    def note(options: TrainOptions, progress: ProgressSink) -> Report:
        asked.append(options)
        return Report("words-1", [], [], 0.4)

    monkeypatch.setattr("moderation.train.train_moderation", note)
    place = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    train_moderation(place)
    files = ["--trunk", str(tmp_path / "trunk.bin"), "--checkpoint", str(tmp_path / "kept")]
    train_moderation([*place, "--seed", "3", "--accept-falls", *files])
    train_moderation([*place, "--ngrams-only", "--licences", "all"])

    plain, full, ngrams = asked
    assert (plain.accept_falls, plain.trunk, plain.checkpoint, plain.licences) == (False, None, None, "yes")
    assert plain.encoder is not None
    assert full.encoder is not None
    assert (full.accept_falls, full.seed, full.encoder.seed) == (True, 3, 3)
    assert (full.trunk, full.checkpoint) == (tmp_path / "trunk.bin", tmp_path / "kept")
    assert (ngrams.encoder, ngrams.licences) == (None, "all")
