from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from moderation.errors import ModerationError
from moderation.rows import check_list, row_key
from moderation.written import expand_phrases, written_directory

pytestmark = pytest.mark.unit

ROWS = expand_phrases(written_directory(), seed=0, rows_per_line=3)


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    assert expand_phrases(written_directory(), seed=0, rows_per_line=3) == ROWS
    assert expand_phrases(written_directory(), seed=1, rows_per_line=3) != ROWS


def test_no_bracket_or_slot_is_left_over() -> None:
    assert [row.text for row in ROWS if re.search(r"[\[\]{}|]", row.text)] == []


def test_both_labels_are_written_in_both_languages() -> None:
    counts = Counter((row.lang, row.label) for row in ROWS)

    assert all(counts[lang, label] >= 150 for lang in ("en", "zh") for label in (0, 1))


def test_every_row_is_in_its_language() -> None:
    for row in ROWS:
        has_han = re.search("[\u4e00-\u9fff]", row.text) is not None
        assert has_han == (row.lang == "zh"), row.text


def test_no_text_is_written_with_both_labels() -> None:
    label_of: dict[str, int] = {}
    for row in expand_phrases(written_directory(), seed=0, rows_per_line=20):
        assert label_of.setdefault(row_key(row.text), row.label) == row.label, row.text


def test_our_check_lists_are_on_no_phrase_list() -> None:
    checked = {row_key(row.text) for name in ("everyday.jsonl", "blatant.jsonl") for row in check_list(name)}
    lines = "\n".join(path.read_text(encoding="utf-8") for path in written_directory().glob("*.toml"))

    assert not any(row_key(line) in checked for line in lines.splitlines())


def test_an_unknown_slot_is_named(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(written_directory(), tmp_path / "written"))
    path = directory / "zh_harmless.toml"
    path.write_text(path.read_text(encoding="utf-8").replace("{topic}", "{tpoic}"), encoding="utf-8")

    with pytest.raises(ModerationError, match="unknown list"):
        expand_phrases(directory, seed=0, rows_per_line=30)


def test_a_missing_phrase_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModerationError, match=r"wrappers\.toml"):
        expand_phrases(tmp_path, seed=0, rows_per_line=1)
