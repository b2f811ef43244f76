from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from moderation.errors import ModerationError
from moderation.rows import (
    Licences,
    Row,
    drop_known,
    first_user_turns,
    labelled_rows,
    read_licences,
    row_key,
    user_turns,
)

pytestmark = pytest.mark.unit


def write_lines(path: Path, records: list[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(json.dumps(record) for record in records).encode()))


def row(text: str, label: int = 0) -> Row:
    return Row(text, label, "en", "source")


def test_key_ignores_case_width_spaces_and_punctuation() -> None:
    assert row_key("How do I,  kill a PROCESS?") == row_key("how do i kill a ｐｒｏｃｅｓｓ")
    assert row_key("杀毒 软件！") == row_key("杀毒软件")
    assert row_key("kill") != row_key("skill")


def test_known_rows_are_counted_and_repeated_ones_kept_once() -> None:
    rows = [row("One."), row("two"), row("ONE"), row("Three!")]

    kept, num_known = drop_known(rows, {row_key("three")})

    assert kept == [rows[0], rows[1]]
    assert num_known == 1


def test_a_star_in_the_licence_list_is_a_prefix() -> None:
    licences = Licences(("cold", "books/*"))

    assert licences.allow("cold")
    assert licences.allow("books/austen")
    assert not licences.allow("colder")
    assert not licences.allow("books")


def test_first_turns_and_user_turns_of_conversations(tmp_path: Path) -> None:
    roles = ["user", "assistant", "user"]
    messages = [{"role": role, "content": f"turn {i}"} for i, role in enumerate(roles)]
    write_lines(tmp_path / "sft/a.jsonl.gz", [{"messages": messages, "lang": "en", "source": "s"}])
    write_lines(tmp_path / "prompts/b.jsonl.gz", [{"prompt": messages, "lang": "en", "source": "s"}])

    for name in ("sft/a.jsonl.gz", "prompts/b.jsonl.gz"):
        assert [r.text for r in first_user_turns(tmp_path, name)[0]] == ["turn 0"]
        assert [r.text for r in user_turns(tmp_path, name)[0]] == ["turn 0", "turn 2"]


def test_the_description_of_a_file_changes_with_its_content(tmp_path: Path) -> None:
    record = {"text": "t", "label": 1, "lang": "en", "source": "s", "category": "c"}
    write_lines(tmp_path / "a.gz", [record])
    write_lines(tmp_path / "b.gz", [record, record])

    rows, first = labelled_rows(tmp_path, "a.gz")
    _, second = labelled_rows(tmp_path, "b.gz")

    assert rows == [Row("t", 1, "en", "s", "c")]
    assert (first.rows, second.rows) == (1, 2)
    assert first.sha256 != second.sha256


def test_a_malformed_row_is_named_by_file_and_line(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.gz", [{"text": "t", "label": 1, "lang": "en", "source": "s"}, {"text": 3}])

    with pytest.raises(ModerationError, match=r"a\.gz line 2"):
        labelled_rows(tmp_path, "a.gz")


def test_a_missing_file_says_how_to_name_the_directory(tmp_path: Path) -> None:
    with pytest.raises(ModerationError, match="--data or CAUSERIE_DATA"):
        labelled_rows(tmp_path, "a.gz")
    with pytest.raises(ModerationError, match=r"licences\.json"):
        read_licences(tmp_path)
