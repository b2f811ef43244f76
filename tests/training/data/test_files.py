from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from training.data.files import open_lines, read_text
from training.errors import DataError

pytestmark = pytest.mark.unit

CONTENT = b'{"a": 1}\n\n  \n{"a": 2}\r\n{"a": 3}'
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": lambda content: content,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": lambda content: zstandard.ZstdCompressor().compress(content),
}


def lines_of(path: Path) -> list[tuple[int, bytes]]:
    with open_lines(path) as lines:
        return list(lines)


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_lines_are_numbered_as_an_editor_does_whatever_the_compression(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(COMPRESSORS[suffix](CONTENT))
    assert lines_of(path) == [(1, b'{"a": 1}'), (4, b'{"a": 2}'), (5, b'{"a": 3}')]


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("num_read", [0, 1, 3])
def test_hash_is_of_the_whole_file_however_much_was_read(tmp_path: Path, suffix: str, num_read: int) -> None:
    path = tmp_path / f"rows{suffix}"
    content = COMPRESSORS[suffix](CONTENT * 100_000)
    path.write_bytes(content)
    with open_lines(path) as lines:
        for _ in zip(range(num_read), lines, strict=False):
            pass
        assert lines.sha256() == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("kept", [0.5, 0.999])
def test_file_that_was_cut_off_is_refused(tmp_path: Path, suffix: str, kept: float) -> None:
    content = COMPRESSORS[suffix]("".join(f'{{"a": {number}}}\n' for number in range(50_000)).encode())
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match="is the file complete"):
        lines_of(path)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_file_that_is_not_compressed_as_its_name_says_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(CONTENT)
    with pytest.raises(DataError, match=r"rows.* line 1: cannot be read"):
        lines_of(path)


def test_frames_one_after_another_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.zst"
    frames = [zstandard.ZstdCompressor().compress(line) for line in (b"a\nb", b"", b"c\nd\n")]
    path.write_bytes(b"".join(frames))
    assert [line for _, line in lines_of(path)] == [b"a", b"bc", b"d"]


def test_line_longer_than_the_limit_is_named_and_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"short\n" + b"x" * 100)
    with pytest.raises(DataError, match="line 2: longer than 50 bytes"), open_lines(path, max_line_bytes=50) as lines:
        list(lines)


def test_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf{}\n")
    assert lines_of(path) == [(1, b"{}")]


@pytest.mark.parametrize("name", ["rows.json", "rows.parquet", "rows.jsonl.bz2"])
def test_other_kinds_of_file_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"expected \.jsonl, \.jsonl\.gz, \.jsonl\.zst"):
        lines_of(tmp_path / name)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl cannot be read: No such file"):
        lines_of(tmp_path / "absent.jsonl")


def test_text_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt.gz"
    path.write_bytes(gzip.compress("One.\nZwölf.".encode()))
    assert read_text(path) == "One.\nZwölf."


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_bytes("Zwölf".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        read_text(path)
