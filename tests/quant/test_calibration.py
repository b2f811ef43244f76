from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quant.calibration import (
    BUNDLED_CALIBRATION,
    BUNDLED_HELD_OUT,
    Row,
    bundled_rows,
    calibration_windows,
    encode_rows,
    held_out_windows,
    load_rows,
)
from quant.errors import QuantizationError

pytestmark = pytest.mark.unit


def encode_letters(row: Row) -> list[int]:
    return [ord(letter) for letter in row.text]


def test_conversations_and_texts_are_read_from_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "one"}\n\n{"messages": [{"role": "user", "content": "two"}]}\n', encoding="utf-8")
    first, second = load_rows(path)
    assert first.text == "one"
    assert [(message.role, message.content) for message in second.messages] == [("user", "two")]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("c.jsonl", '{"text": "one"}\n{"text"', "line 2: not valid JSON"),
        ("c.jsonl", '{"prompt": "one"}', r"line 1: expected .*messages"),
        ("c.jsonl", '{"messages": [{"role": "robot", "content": "x"}]}', "roles system, user"),
        ("c.jsonl", "[1]", "line 1: expected"),
        ("c.jsonl", "\n", "is empty"),
        ("c.csv", "one", r"\.jsonl or \.txt"),
    ],
)
def test_a_wrong_file_is_an_error_that_says_where(tmp_path: Path, name: str, content: str, complaint: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(QuantizationError, match=complaint):
        load_rows(path)


def test_a_missing_file_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="cannot be read"):
        load_rows(tmp_path / "absent.txt")


def test_seed_decides_the_order_of_rows() -> None:
    rows = [Row(text=letter) for letter in "abcdefgh"]
    assert torch.equal(encode_rows(rows, encode_letters, 1), encode_rows(rows, encode_letters, 1))
    assert not torch.equal(encode_rows(rows, encode_letters, 1), encode_rows(rows, encode_letters, 2))
    assert encode_rows(rows, encode_letters).tolist() == [ord(letter) for letter in "abcdefgh"]


def test_windows_cover_the_text_from_end_to_end() -> None:
    windows = calibration_windows(torch.arange(100), samples=5, seq_len=30)
    assert windows.shape == (5, 30)
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 99


def test_too_little_text_is_an_error_with_the_number_needed() -> None:
    with pytest.raises(QuantizationError, match=r"has 99 tokens; 10 samples of 20 need at least 100.*--samples 9"):
        calibration_windows(torch.arange(99), samples=10, seq_len=20)
    assert calibration_windows(torch.arange(100), samples=10, seq_len=20).shape == (10, 20)


def test_text_shorter_than_one_window_is_an_error() -> None:
    with pytest.raises(QuantizationError, match="need at least 20"):
        calibration_windows(torch.arange(19), samples=1, seq_len=20)


def test_held_out_windows_do_not_overlap_and_are_full() -> None:
    windows = held_out_windows(torch.arange(50), seq_len=8, max_tokens=44)
    assert torch.equal(windows.flatten(), torch.arange(40))


def test_bundled_texts_are_disjoint() -> None:
    calibration, held_out = bundled_rows(BUNDLED_CALIBRATION), bundled_rows(BUNDLED_HELD_OUT)
    assert len(calibration) > 100
    assert not set(calibration) & set(held_out)
