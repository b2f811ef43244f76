from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training.data.row_files import chat, document, pair, say, write_rows
from training.data import LoadPolicy, load_conversations
from training.data.check import check_files, run
from training.errors import DataError, TrainingError
from training.settings import DataCheckSettings

pytestmark = pytest.mark.unit


def test_kind_of_each_file_is_seen_from_its_keys(tmp_path: Path) -> None:
    files = (
        write_rows(tmp_path / "a.jsonl", chat("1", "2")),
        write_rows(tmp_path / "b.jsonl", pair("1", "2", "3")),
        write_rows(tmp_path / "c.jsonl", {"prompt": [say("user", "1")]}),
        write_rows(tmp_path / "d.jsonl", document("1")),
        write_rows(tmp_path / "e.jsonl", chat("3", "4")),
    )
    checked = check_files(DataCheckSettings(data=files))
    assert [(part.kind, part.report.kept) for part in checked] == [
        ("conversations", 2),
        ("rankings", 1),
        ("prompts", 1),
        ("documents", 1),
    ]


def test_report_in_json_names_files_sources_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "a.jsonl", chat("1", "2"), chat("1", "2"))
    run(DataCheckSettings(data=(path,), json=True))
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["kind"], record["read"], record["duplicates"]) == ("conversations", 2, 1)
    assert record["files"][0]["name"] == "a.jsonl"
    assert record["sources"] == {"ours": 1}


def test_table_says_what_is_used_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "licences.json").write_text('{"yes": ["ours"], "no": ["paid"]}')
    path = write_rows(tmp_path / "a.jsonl", document("1"), document("2", "paid"))
    run(DataCheckSettings(data=(path,), licences="yes"))
    printed = capsys.readouterr().out
    assert "documents: 1 of 2 rows (left out: licence 1)" in printed
    assert "paid" in printed


@pytest.mark.parametrize("name", ["clean.jsonl", "clean.jsonl.gz"])
def test_cleaned_file_holds_what_is_left_and_is_clean(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", chat("1", "2"), chat("1", "2"), chat("3", "4"))
    run(DataCheckSettings(data=(path,), clean=tmp_path / name))
    cleaned = load_conversations([tmp_path / name], LoadPolicy())
    assert cleaned.rows == load_conversations([path], LoadPolicy()).rows
    assert cleaned.report.read == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", name]


def test_cleaned_file_never_replaces_its_source(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", chat("1", "2"))
    with pytest.raises(TrainingError, match="is one of the files that are read"):
        run(DataCheckSettings(data=(path,), clean=tmp_path / "." / "a.jsonl"))


def test_rows_of_two_kinds_are_not_written_to_one_file(tmp_path: Path) -> None:
    files = (write_rows(tmp_path / "a.jsonl", chat("1", "2")), write_rows(tmp_path / "b.jsonl", document("1")))
    with pytest.raises(TrainingError, match="would hold conversations and documents"):
        run(DataCheckSettings(data=files, clean=tmp_path / "clean.jsonl"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [("", "holds no row"), ('{"question": 1}', "line 1: neither `messages`"), ("[1]", "line 1: Expected `object`")],
)
def test_file_of_no_known_kind_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=reason):
        check_files(DataCheckSettings(data=(path,)))
