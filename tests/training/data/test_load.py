from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.data.row_files import as_lines, chat, document, pair, say, write_rows
from training.data import (
    LoadPolicy,
    load_conversations,
    load_documents,
    load_prompts,
    load_rankings,
)
from training.data import load as load_module
from training.errors import DataError

pytestmark = pytest.mark.unit

LICENCES = {"yes": ["ours", "free/*"], "no": ["paid"]}


def write_licences(folder: Path) -> Path:
    path = folder / "licences.json"
    path.write_text(json.dumps(LICENCES))
    return path


def test_rows_come_in_order_with_hash_and_sources(tmp_path: Path) -> None:
    write_licences(tmp_path)
    (tmp_path / "sft").mkdir()
    first = write_rows(tmp_path / "sft" / "a.jsonl", chat("1", "one"), chat("2", "two", "free/x"))
    second = tmp_path / "sft" / "b.jsonl.gz"
    second.write_bytes(gzip.compress(as_lines([chat("3", "three", "paid")])))
    loaded = load_conversations([first, second], LoadPolicy())
    assert [row.messages[1].content for row in loaded.rows] == ["one", "two", "three"]
    assert [(file.name, file.rows, file.licence) for file in loaded.files] == [
        ("sft/a.jsonl", 2, "yes"),
        ("sft/b.jsonl.gz", 1, "no"),
    ]
    assert loaded.files[0].sources == {"free/x": 1, "ours": 1}
    assert loaded.report.licences == {"no": 1, "yes": 2}


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b"{", "line 3: Input data was truncated"),
        (b'{"messages": 3}', "line 3: Expected `array`"),
        (as_lines([chat("a", " ")]), r"line 3: messages\[1\] is empty"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "line 3: .*utf-8"),
    ],
)
def test_first_broken_line_is_named_with_file_number_and_reason(tmp_path: Path, broken: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    # The blank line counts, and a second broken line later is not the one that is named.
    path.write_bytes(as_lines([chat("1", "one")]) + b"\n" + broken.rstrip() + b"\nnot json\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl {reason}"):
        load_conversations([path], LoadPolicy())


def test_duplicates_are_left_out_across_files_and_counted(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a.jsonl", chat("Hello", "Hi"), chat("hello!", "hi."))
    second = write_rows(tmp_path / "b.jsonl", chat("HELLO", " Hi "), chat("Hello", "Good day"))
    loaded = load_conversations([first, second], LoadPolicy())
    assert [row.messages[1].content for row in loaded.rows] == ["Hi", "Good day"]
    assert (loaded.report.read, loaded.report.kept, loaded.report.duplicates) == (4, 2, 2)
    assert [file.rows for file in loaded.files] == [1, 1]


def test_same_pair_the_other_way_round_is_no_duplicate(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", pair("Hello", "Hi", "No"), pair("Hello", "No", "Hi"))
    assert load_rankings([path], LoadPolicy()).report.kept == 2


def test_rankings_that_prefer_nothing_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", pair("Hello", "Hi", "No"), pair("Bye", "So long", "So long"))
    report = load_rankings([path], LoadPolicy()).report
    assert (report.kept, report.undecided) == (1, 1)


def test_rows_of_evaluation_files_are_left_out_and_counted(tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "eval.jsonl", {"prompt": [say("user", "Name a colour")]})
    path = write_rows(tmp_path / "a.jsonl", chat("name a colour!", "Blue"), chat("Name a bird", "Jay"))
    loaded = load_conversations([path], LoadPolicy(exclude=(held_out,)))
    assert [row.messages[1].content for row in loaded.rows] == ["Jay"]
    assert loaded.report.overlapping == 1


def test_documents_are_compared_by_runs_of_words(tmp_path: Path) -> None:
    text = " ".join(f"word{number}" for number in range(60))
    held_out = tmp_path / "book.txt"
    held_out.write_text(text)
    path = write_rows(tmp_path / "a.jsonl", document(f"It began so: {text[100:300]}"), document("Another book."))
    loaded = load_documents([path], LoadPolicy(exclude=(held_out,)))
    assert [row.text for row in loaded.rows] == ["Another book."]


def test_only_sources_that_may_ship_are_kept_and_unknown_ones_are_not(tmp_path: Path) -> None:
    write_licences(tmp_path)
    rows = [document(str(number), source) for number, source in enumerate(("ours", "paid", "free/b", "else", "paid"))]
    loaded = load_documents([write_rows(tmp_path / "a.jsonl", *rows)], LoadPolicy(licences="yes"))
    assert [row.source for row in loaded.rows] == ["ours", "free/b"]
    assert loaded.report.unlicensed_sources == {"else": 1, "paid": 2}
    assert loaded.files[0].licence == "yes"


def test_licences_file_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "rights").mkdir()
    policy = LoadPolicy(licences="yes", licences_file=write_licences(tmp_path / "rights"))
    (tmp_path / "data").mkdir()
    path = write_rows(tmp_path / "data" / "a.jsonl", document("a"), document("b", "paid"))
    loaded = load_documents([path], policy)
    assert (loaded.report.kept, loaded.files[0].name) == (1, "a.jsonl")


def test_asking_for_licences_without_a_licences_file_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", document("a"))
    with pytest.raises(DataError, match=r"there is no licences\.json beside it or above"):
        load_documents([path], LoadPolicy(licences="yes"))
    assert load_documents([path], LoadPolicy()).files[0].licence is None


def test_maximum_of_rows_is_of_each_file(tmp_path: Path) -> None:
    files = [write_rows(tmp_path / f"{name}.jsonl", *(document(f"{name}{i}") for i in range(5))) for name in "ab"]
    assert [row.text for row in load_documents(files, LoadPolicy(max_rows=2)).rows] == ["a0", "a1", "b0", "b1"]


def test_nothing_left_is_an_error_that_says_why(tmp_path: Path) -> None:
    write_licences(tmp_path)
    path = write_rows(tmp_path / "a.jsonl", {"prompt": [say("user", "a")], "source": "paid"})
    with pytest.raises(DataError, match=r"no row is left of .*a\.jsonl: 0 of 1 rows \(left out: licence 1\)"):
        load_prompts([path], LoadPolicy(licences="yes"))


def test_no_file_is_an_error() -> None:
    with pytest.raises(DataError, match="there is no data file"):
        load_prompts([], LoadPolicy())


def test_more_rows_than_memory_is_meant_for_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "MAX_ROWS", 3)
    path = write_rows(tmp_path / "a.jsonl", *(document(str(number)) for number in range(4)))
    with pytest.raises(DataError, match=r"more than 3 rows; use fewer files, or --max-rows"):
        load_documents([path], LoadPolicy())


def test_counts_add_up(tmp_path: Path) -> None:
    write_licences(tmp_path)
    held_out = write_rows(tmp_path / "eval.jsonl", pair("held out", "a", "b"))
    rows = [pair("1", "a", "b"), pair("1", "A", "b"), pair("2", "a", "a"), pair("held out", "x", "y")]
    path = write_rows(tmp_path / "a.jsonl", *rows, pair("3", "a", "b", "paid"))
    report = load_rankings([path], LoadPolicy(licences="yes", exclude=(held_out,))).report
    assert report.record() == {
        "read": 5,
        "kept": 1,
        "duplicates": 1,
        "overlapping": 1,
        "unlicensed": 1,
        "undecided": 1,
        "unwanted": 0,
        "sources": {"ours": 1},
        "unlicensed_sources": {"paid": 1},
        "licences": {"yes": 1},
    }
    assert str(report) == "1 of 5 rows (left out: duplicates 1, in evaluation files 1, licence 1, undecided 1)"


def test_reading_rows_loads_no_torch() -> None:
    code = "import sys, training.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_the_named_sources_are_used(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "d.jsonl",
        chat("one", "1", source="books/a"),
        chat("two", "2", source="books/b"),
        chat("three", "3", source="tweets"),
    )
    loaded = load_conversations([path], LoadPolicy(sources=("books/*",)))
    assert [row.source for row in loaded.rows] == ["books/a", "books/b"]
    assert loaded.report.unwanted == 1
    assert "other sources 1" in str(loaded.report)
