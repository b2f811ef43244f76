"""When two texts count as the same, and which rows occur in an evaluation file.

Chats are compared by their first user turn, documents by runs of words, because a book is cut differently in each file.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from training.data.files import TEXT_SUFFIXES, open_lines, read_text
from training.data.records import Document, Ranking, Row
from training.errors import DataError

__all__ = ["RUN_WORDS", "EvaluationTexts", "read_evaluation", "row_digest", "text_key"]

# The n of arXiv:2005.14165, appendix C. Runs are looked for at every _STRIDE-th word, so that each one of
# RUN_WORDS + _STRIDE - 1 words is found at a quarter of the work.
RUN_WORDS = 13
_STRIDE = 4

_NOT_TEXT = re.compile(r"[\W_]+")
_SIGN_BETWEEN_DIGITS = re.compile(r"(\d)\s*([-+*/^.:])\s*(?=\d)")
# Chinese and Japanese have no spaces: each of their characters counts as a word.
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


def text_key(text: str) -> str:
    """Equal for texts that differ only in case, width, spaces and punctuation; 3 + 4 is not 3 - 4, and 2.5 not 25."""
    folded = unicodedata.normalize("NFKC", text).lower()
    spelled = _SIGN_BETWEEN_DIGITS.sub(lambda found: f"{found[1]}sign{ord(found[2])}", folded)
    return _NOT_TEXT.sub("", spelled) or folded.strip()


def row_digest(row: Row) -> bytes:
    """Equal for rows whose texts, answers included, have equal keys."""
    match row:
        case Document():
            return _digest([row.text])
        case Ranking():
            return _digest([*_contents(row.prompt), *row.answers])
        case _:
            return _digest(_contents(row.messages))


@dataclass(frozen=True, slots=True)
class EvaluationTexts:
    """What evaluation files hold. texts: digests of first user turns and whole texts; runs: hashes of runs of words."""

    texts: frozenset[bytes] = frozenset()
    runs: frozenset[int] = frozenset()

    def overlap(self, row: Row) -> bool:
        match row:
            case Document():
                return self._holds_text(row.text) or not self.runs.isdisjoint(_runs(row.text, _STRIDE))
            case Ranking():
                return self._holds_text(_first_user_turn(row.prompt))
            case _:
                return self._holds_text(_first_user_turn(row.messages))

    def _holds_text(self, text: str) -> bool:
        return bool(self.texts) and _digest([text]) in self.texts


def read_evaluation(files: Sequence[Path], *, with_runs: bool) -> EvaluationTexts:
    """Of rows of any kind, evaluation prompts with further keys, and plain .txt files. Raises DataError.

    with_runs: documents are to be compared; chats need no runs.
    """
    texts: set[bytes] = set()
    runs: set[int] = set()
    for path in files:
        for text in _evaluation_texts(path):
            texts.add(_digest([text]))
            if with_runs:
                runs.update(_runs(text, 1))
    return EvaluationTexts(frozenset(texts), frozenset(runs))


class _EvaluationMessage(msgspec.Struct):
    role: str
    content: str


class _EvaluationLine(msgspec.Struct):
    messages: list[_EvaluationMessage] = []
    prompt: list[_EvaluationMessage] = []
    text: str = ""


def _evaluation_texts(path: Path) -> Iterator[str]:
    if path.name.endswith(TEXT_SUFFIXES):
        yield read_text(path)
        return
    decoder = msgspec.json.Decoder(_EvaluationLine)
    with open_lines(path) as lines:
        for number, line in lines:
            try:
                row = decoder.decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise DataError(f"{path} line {number}: {error}") from error
            text = _first_user_turn(row.messages or row.prompt) or row.text
            if not text:
                raise DataError(f"{path} line {number}: there is no `messages`, `prompt` or `text` to compare with")
            yield text


class _Turn(Protocol):
    @property
    def role(self) -> str: ...
    @property
    def content(self) -> str: ...


def _contents(messages: Sequence[_Turn]) -> list[str]:
    return [message.content for message in messages]


def _first_user_turn(messages: Sequence[_Turn]) -> str:
    return next((message.content for message in messages if message.role == "user"), "")


def _runs(text: str, stride: int) -> Iterator[int]:
    """Hashes of runs of words; they differ from one process to the next, so they are never stored."""
    words = _WORDS.findall(unicodedata.normalize("NFKC", text).lower())
    for start in range(0, len(words) - RUN_WORDS + 1, stride):
        yield hash(tuple(words[start : start + RUN_WORDS]))


def _digest(texts: Iterable[str]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(text_key(text).encode())
        digest.update(b"\0")
    return digest.digest()
