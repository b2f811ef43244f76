from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.data.licences import Licences, find_licences, read_licences
from training.errors import DataError

pytestmark = pytest.mark.unit

RULES = Licences(yes=("gsm8k", "books/*"), no=("books/stolen",))


@pytest.mark.parametrize(
    ("source", "verdict"),
    [
        ("gsm8k", "yes"),
        ("gsm8k_train", "unknown"),
        ("books/emma", "yes"),
        ("books", "unknown"),
        ("books/stolen", "no"),
        ("", "unknown"),
    ],
)
def test_source_is_judged_by_name_or_prefix_and_no_comes_first(source: str, verdict: str) -> None:
    assert RULES.judge(source) == verdict


def test_nearest_file_above_the_data_is_found(tmp_path: Path) -> None:
    data = tmp_path / "data" / "sft" / "train.jsonl"
    data.parent.mkdir(parents=True)
    assert find_licences(data) is None
    (tmp_path / "licences.json").write_text("{}")
    (tmp_path / "data" / "licences.json").write_text("{}")
    assert find_licences(data) == (tmp_path / "data" / "licences.json").resolve()


def test_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "licences.json"
    path.write_text(json.dumps({"about": "rights", "yes": ["a"], "no": ["b*"]}))
    assert read_licences(path) == Licences(("a",), ("b*",))


@pytest.mark.parametrize("content", ["", "[]", '{"no": []}', '{"yes": "all"}'])
def test_malformed_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "licences.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"licences\.json is no licences file"):
        read_licences(path)
