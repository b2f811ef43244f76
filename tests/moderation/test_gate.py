from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moderation.errors import ModerationError
from moderation.features import FeatureOptions
from moderation.gate import check_falls, fallen_files
from moderation.metrics import Measures
from moderation.report import REPORT_FILE, FileReport, Report, encode_report, read_report
from moderation.rows import Row
from moderation.train import NgramOptions, TrainOptions, train_moderation
from quant.progress import SilentProgress
from tests.moderation.tiny_data import write_training_data

pytestmark = pytest.mark.unit

MEASURES = Measures(100, 50, 0.9, 0.8, 0.1, 0.900, 0.800, 0.05)


def file_report(name: str, *, auroc: float = 0.9, auprc: float = 0.8, sha256: str = "a") -> FileReport:
    return FileReport(f"moderation/{name}.jsonl.gz", sha256, replace(MEASURES, auroc=auroc, auprc=auprc), {})


def report_of(*tests: FileReport) -> Report:
    return Report("words-1", list(tests), [], 0.4)


OLD = report_of(file_report("test_xstest"), file_report("test_openai_moderation"), file_report("test_of_ours"))


def write_old(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / REPORT_FILE).write_bytes(encode_report(OLD))
    return directory


@pytest.mark.parametrize(("auroc", "num_falls"), [(0.95, 0), (0.9, 0), (0.89, 0), (0.8899, 1)])
def test_a_fall_of_more_than_a_point_counts_and_one_of_a_point_does_not(auroc: float, num_falls: int) -> None:
    new = report_of(file_report("test_xstest", auroc=auroc), *OLD.tests[1:])

    assert len(fallen_files(OLD, new)) == num_falls


def test_each_file_is_compared_by_its_own_measure() -> None:
    worse_elsewhere = report_of(
        file_report("test_xstest", auprc=0.1), file_report("test_openai_moderation", auroc=0.1), OLD.tests[2]
    )
    worse = report_of(OLD.tests[0], file_report("test_openai_moderation", auprc=0.7), file_report("test_of_ours"))

    assert fallen_files(OLD, worse_elsewhere) == []
    (fall,) = fallen_files(OLD, worse)
    assert str(fall) == "test_openai_moderation AUPRC 0.800 to 0.700 (10.0 points)"


def test_a_file_that_is_missing_or_has_changed_is_no_way_around() -> None:
    new = report_of(file_report("test_xstest", auroc=0.5, sha256="b"), OLD.tests[1])

    changed, missing = fallen_files(OLD, new)

    assert "the file has changed" in str(changed)
    assert str(missing) == "test_of_ours AUPRC 0.800 to not measured"


def test_a_file_that_is_new_is_no_fall() -> None:
    assert fallen_files(OLD, report_of(*OLD.tests, file_report("test_new", auprc=0.1))) == []


def test_refusal_names_every_fall_and_both_ways_out(tmp_path: Path) -> None:
    new = report_of(
        file_report("test_xstest", auroc=0.85), file_report("test_openai_moderation", auprc=0.5), OLD.tests[2]
    )

    with pytest.raises(ModerationError) as refused:
        check_falls(write_old(tmp_path / "weights"), new, accept_falls=False)

    for words in ("test_xstest AUROC", "5.0 points", "test_openai_moderation AUPRC", "--accept-falls", "--out DIR"):
        assert words in str(refused.value)


def test_falls_that_are_accepted_are_returned_and_refuse_nothing(tmp_path: Path) -> None:
    new = report_of(file_report("test_xstest", auroc=0.85), *OLD.tests[1:])

    (fall,) = check_falls(write_old(tmp_path), new, accept_falls=True)

    assert fall.file == "test_xstest"


def test_a_place_without_a_report_takes_any_weights(tmp_path: Path) -> None:
    assert check_falls(tmp_path / "new", OLD, accept_falls=False) == []


def test_a_report_that_cannot_be_read_refuses_rather_than_lets_pass(tmp_path: Path) -> None:
    (tmp_path / REPORT_FILE).write_text("{}")

    with pytest.raises(ModerationError, match="cannot be used as a report"):
        check_falls(tmp_path, OLD, accept_falls=False)


def test_an_older_report_that_lacks_the_new_fields_still_compares(tmp_path: Path) -> None:
    measures = '{"rows":2,"harmful":1,"precision":1,"recall":1,"false_positive_rate":0,"auroc":0.9,"auprc":0.9'
    test = f'{{"name":"moderation/test_xstest.jsonl.gz","sha256":"a","overall":{measures},"calibration_error":0}}'
    old = f'{{"model":"m","threshold":0.7,"tests":[{test},"by_language":{{}}}}],"ordinary":[]'
    (tmp_path / REPORT_FILE).write_text(f'{old},"milliseconds_per_message":0.4}}')

    with pytest.raises(ModerationError, match=r"test_xstest AUROC 0\.900 to 0\.500"):
        check_falls(tmp_path, report_of(file_report("test_xstest", auroc=0.5)), accept_falls=False)


def raise_reported_areas(directory: Path, by: float) -> None:
    """As if the weights there had been better than they are."""
    report = read_report(directory / REPORT_FILE)
    tests = [
        replace(test, overall=replace(test.overall, auprc=(test.overall.auprc or 0.0) + by)) for test in report.tests
    ]
    (directory / REPORT_FILE).write_bytes(encode_report(replace(report, tests=tests)))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def no_phrases(directory: Path, seed: int, rows_per_line: int) -> list[Row]:
    """Thousands of rows of our own would take seconds and change nothing here."""
    return []


def no_plots(report: Report, folder: Path) -> list[str]:
    return []


def test_training_leaves_better_weights_in_place_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moderation.corpus.expand_phrases", no_phrases)
    monkeypatch.setattr("moderation.publish.write_plots", no_plots)
    data, out = write_training_data(tmp_path / "data"), tmp_path / "weights"
    ngram = NgramOptions(iterations=3, features=FeatureOptions(bucket_bits=10))
    options = TrainOptions(data, out, rows_per_line=1, passages=3, ngram=ngram, encoder=None)
    train_moderation(options, SilentProgress())
    raise_reported_areas(out, by=0.02)
    better = contents(out)

    with pytest.raises(ModerationError, match=r"test_openai_moderation AUPRC .*2\.0 points.*--accept-falls"):
        train_moderation(options, SilentProgress())
    assert contents(out) == better

    train_moderation(replace(options, accept_falls=True), SilentProgress())
    assert contents(out) != better
