"""The lines of .jsonl, .jsonl.gz and .jsonl.zst files (and .txt), streamed once, with their hash on the way."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import sys
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, cast

from training.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

__all__ = ["MAX_LINE_BYTES", "ROW_SUFFIXES", "TEXT_SUFFIXES", "LineReader", "open_lines", "read_text"]

ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TEXT_SUFFIXES = (".txt", ".txt.gz", ".txt.zst")
# A book is some megabytes; a longer line is a file that is no JSON lines, or would not fit in memory with its tokens.
MAX_LINE_BYTES = 32 * 2**20
_READ_BYTES = 2**20
# A few kB of zstd can hold megabytes of one repeated character.
_ZSTD_READ_BYTES = 2**14
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class LineReader:
    """Iterates over (line number from 1, line without its end); lines of white space are passed over."""

    def __init__(self, path: Path, content: BinaryIO, hashed: _HashedFile, max_line_bytes: int) -> None:
        self._path, self._content, self._hashed, self._max_line_bytes = path, content, hashed, max_line_bytes

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        number = 0
        while line := self._next_line(number + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if stripped := line.strip():
                yield number, stripped

    def sha256(self) -> str:
        """Of the file as it lies on disk, whether or not all of it has been iterated over."""
        return self._hashed.finish()

    def _next_line(self, number: int) -> bytes:
        try:
            line = self._content.readline(self._max_line_bytes + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{self._path} line {number}: cannot be read ({error}); is the file complete?") from error
        if len(line) > self._max_line_bytes:
            limit = f"{self._max_line_bytes:,} bytes"
            raise DataError(f"{self._path} line {number}: longer than {limit}; expected one JSON object a line")
        return line


@contextlib.contextmanager
def open_lines(path: Path, *, max_line_bytes: int = MAX_LINE_BYTES) -> Generator[LineReader]:
    """Raises DataError for a file that is missing, of another kind, or needs a package that is not installed."""
    if not path.name.endswith(ROW_SUFFIXES + TEXT_SUFFIXES):
        raise DataError(f"{path} is no file of rows; expected {', '.join(ROW_SUFFIXES)}")
    try:
        raw = path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    with raw:
        hashed = _HashedFile(raw)
        with _decompressed(path, io.BufferedReader(hashed, _READ_BYTES)) as content:
            yield LineReader(path, content, hashed, max_line_bytes)


def read_text(path: Path) -> str:
    """All of a text file, decompressed; for evaluation files, which are small."""
    with open_lines(path) as lines:
        content = b"\n".join(line for _, line in lines)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error})") from error


class _HashedFile(io.RawIOBase):
    """Reads through to a file and hashes what passes, so that a file is read once and not twice."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        data = self._raw.read(len(view))
        self._digest.update(data)
        view[: len(data)] = data
        return len(data)

    def finish(self) -> str:
        while data := self._raw.read(_READ_BYTES):
            self._digest.update(data)
        return self._digest.hexdigest()


class _Zstd(Protocol):
    """What `zstandard`'s decompression objects and `compression.zstd`'s have in common. Good for one frame."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


class _ZstdFile(io.RawIOBase):
    """Unlike zstandard's own reader, this one does not take a file that was cut off for a whole one."""

    def __init__(self, raw: BinaryIO, new_frame: Callable[[], _Zstd], failure: type[Exception]) -> None:
        self._raw, self._new_frame, self._failure = raw, new_frame, failure
        self._frame: _Zstd | None = None
        self._compressed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        while not self._plain:
            self._compressed = self._compressed or self._raw.read(_ZSTD_READ_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("compressed file ended before the end of a frame")
                return 0
            self._plain = memoryview(self._decompress())
        length = min(len(view), len(self._plain))
        view[:length] = self._plain[:length]
        self._plain = self._plain[length:]
        return length

    def _decompress(self) -> bytes:
        frame = self._frame or self._new_frame()
        try:
            plain = frame.decompress(self._compressed)
        except self._failure as error:
            raise OSError(str(error)) from error
        self._compressed = frame.unused_data if frame.eof else b""
        self._frame = None if frame.eof else frame
        return plain


def _decompressed(path: Path, content: BinaryIO) -> contextlib.AbstractContextManager[BinaryIO]:
    if path.suffix == ".gz":
        return cast("BinaryIO", gzip.GzipFile(fileobj=content, mode="rb"))
    if path.suffix == ".zst":
        new_frame, failure = _zstd_library(path)
        return io.BufferedReader(_ZstdFile(content, new_frame, failure))
    return content


def _zstd_library(path: Path) -> tuple[Callable[[], _Zstd], type[Exception]]:
    """(maker of one frame's decompressor, its error class) of the standard library or of `zstandard`."""
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.ZstdDecompressor, zstd.ZstdError
    try:
        import zstandard
    except ImportError:
        raise DataError(
            f"{path} is compressed with zstd; this Python needs a package for it: pip install 'causerie[train]'"
        ) from None
    return lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
