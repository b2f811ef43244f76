from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quant.errors import QuantizationError
from quant.run.calibration import (
    BUNDLED_CALIBRATION,
    BUNDLED_HELD_OUT,
    Message,
    Row,
    bundled_rows,
    calibration_windows,
    encode_rows,
    held_out_windows,
    load_rows,
    refuse_overlap,
)

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
        (
            "c.jsonl",
            '{"messages": [{"role": "robot", "content": "x"}]}',
            "has the role 'robot'; roles are system, user",
        ),
        ("c.jsonl", '{"messages": [{"role": ["user"], "content": "x"}]}', r"has the role \['user'\]"),
        ("c.jsonl", '{"text": "a"}\n{"messages": ["x"]}', "line 2: message 1 is str"),
        ("c.jsonl", '{"messages": [{"role": "user", "content": 7}]}', "message 1: content is int, expected a string"),
        ("c.jsonl", '{"messages": {"role": "user"}}', "found messages: dict"),
        ("c.jsonl", '{"text": 5}', "found text: int"),
        ("c.jsonl", '{"text": " \\n"}', "line 1: its text is empty"),
        ("c.jsonl", '{"messages": [{"role": "user", "content": ""}]}', "message 1: its content is empty"),
        ("c.jsonl", '{"text": "a", "text": "b"}', "the key 'text' occurs twice"),
        ("c.jsonl", '{"text": "a", "messages": []}', "has both text and messages"),
        ("c.jsonl", '{"text": "\\ud83d alone"}', r"half a surrogate pair \(\\ud83d\)"),
        ("c.jsonl", "[" * 100_000, "line 1: not valid JSON"),
        ("c.jsonl", '{"text": ' + "9" * 5000 + "}", "line 1: not valid JSON"),
        ("c.jsonl", '{"text": "' + "x" * 2_000_001 + '"}', "line 1 has 2,000,013 characters; at most 2,000,000"),
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


def test_rows_after_enough_tokens_are_not_encoded() -> None:
    rows = [Row(text=letter * 10) for letter in "abcdefgh"]
    whole = encode_rows(rows, encode_letters, 1)
    assert torch.equal(encode_rows(rows, encode_letters, 1, enough_tokens=31), whole[:40])
    assert torch.equal(encode_rows(rows, encode_letters, 1, enough_tokens=1000), whole)


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
    with pytest.raises(QuantizationError, match=r"need at least 20: give more text$"):
        calibration_windows(torch.arange(19), samples=1, seq_len=20)


def test_held_out_windows_do_not_overlap_and_are_full() -> None:
    windows = held_out_windows(torch.arange(50), seq_len=8, max_tokens=44)
    assert torch.equal(windows.flatten(), torch.arange(40))


def test_bundled_texts_are_disjoint() -> None:
    calibration, held_out = bundled_rows(BUNDLED_CALIBRATION), bundled_rows(BUNDLED_HELD_OUT)
    assert len(calibration) > 100
    assert not set(calibration) & set(held_out)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    assert [(row.text, row.line) for row in load_rows(path)] == [("one", 1), ("two", 2)]


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "one\u2028two\x85three"}\n', encoding="utf-8")
    assert [row.text for row in load_rows(path)] == ["one\u2028two\x85three"]


PASSAGE = " ".join(f"word{number}" for number in range(25))


@pytest.mark.parametrize(
    "copied",
    [
        Row(text=f"before, {PASSAGE} and after", line=7),
        Row(text=PASSAGE.upper().replace(" ", ",\n"), line=7),
        Row(messages=(Message("user", "hello"), Message("assistant", f"Well: {PASSAGE}")), line=7),
    ],
)
def test_a_passage_of_the_held_out_text_is_refused_by_its_line(copied: Row) -> None:
    rows = [Row(text="something else " * 30, line=1), copied]
    with pytest.raises(QuantizationError, match=r'mine\.jsonl, line 7 holds text of held_out\.jsonl.*"word0 word1'):
        refuse_overlap(rows, [Row(text=f"A text. {PASSAGE}")], "mine.jsonl", "held_out.jsonl")


def test_a_text_without_lines_is_named_by_its_file() -> None:
    with pytest.raises(QuantizationError, match=r"^mine\.txt holds text of"):
        refuse_overlap([Row(text=PASSAGE)], [Row(text=PASSAGE)], "mine.txt", "held_out.jsonl")


def test_characters_of_scripts_without_spaces_count_as_words() -> None:
    text = "".join(chr(0x4E00 + number) for number in range(30))
    with pytest.raises(QuantizationError, match="line 1 holds text"):
        refuse_overlap([Row(text=f"x{text}", line=1)], [Row(text=text)], "mine.jsonl", "held_out.jsonl")


def test_phrases_shorter_than_a_passage_and_shared_system_prompts_are_no_copy() -> None:
    short = " ".join(PASSAGE.split()[:19])
    prompt = Row(messages=(Message("system", PASSAGE), Message("user", "hello")))
    refuse_overlap([Row(text=f"{short} new"), prompt], [Row(text=f"old {short}"), prompt], "a", "b")


def test_bundled_texts_share_no_passage() -> None:
    refuse_overlap(bundled_rows(BUNDLED_CALIBRATION), bundled_rows(BUNDLED_HELD_OUT), "calibration", "held out")
