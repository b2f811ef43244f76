"""Labelled texts: reading the data directory, the licence rule, and leaving out what a validation or test file holds.

Used by training and evaluation only. Rows hold text, label, lang, source; conversations hold messages or prompt.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from moderation.errors import ModerationError
from moderation.policy import Turn

__all__ = [
    "DataFile",
    "Licences",
    "Row",
    "answers",
    "check_list",
    "conversations",
    "documents",
    "drop_known",
    "first_user_turns",
    "label_key",
    "labelled_rows",
    "read_licences",
    "row_key",
    "self_labelled_rows",
    "user_turns",
]

Decoded = TypeVar("Decoded")

LABELS_FILE = "labels.jsonl"
NOT_TEXT = re.compile(r"[\W_]+")


@dataclass(frozen=True, slots=True)
class Row:
    """label: 1 harmful, 0 harmless. category: as its source names it, several joined by commas; "none" if unknown."""

    text: str
    label: int
    lang: str
    source: str
    category: str = "none"


@dataclass(frozen=True, slots=True)
class DataFile:
    """What the manifest says of a file that was read; `name` is relative to the data directory."""

    name: str
    sha256: str
    rows: int


@dataclass(frozen=True, slots=True)
class Licences:
    """Sources whose weights may be shipped; a name that ends in * is a prefix."""

    yes: tuple[str, ...]

    def allow(self, source: str) -> bool:
        return any(source.startswith(name[:-1]) if name.endswith("*") else source == name for name in self.yes)


class _Labelled(msgspec.Struct):
    text: str
    label: int
    lang: str
    source: str
    category: str = "none"


class _OwnLabel(msgspec.Struct):
    key: str
    label: int
    category: str


class _Message(msgspec.Struct):
    role: str
    content: str


class _Conversation(msgspec.Struct):
    source: str
    lang: str = "en"
    messages: list[_Message] = []
    prompt: list[_Message] = []

    @property
    def turns(self) -> list[_Message]:
        return self.messages or self.prompt


class _Document(msgspec.Struct):
    text: str
    lang: str
    source: str


class _LicenceFile(msgspec.Struct):
    yes: list[str]


def row_key(text: str) -> str:
    """Equal for texts that differ only in case, width, spaces and punctuation."""
    return NOT_TEXT.sub("", unicodedata.normalize("NFKC", text).lower())


def drop_known(rows: Sequence[Row], known: Collection[str]) -> tuple[list[Row], int]:
    """(rows whose key is neither in `known` nor an earlier row's, number left out because their key is in `known`)."""
    kept: dict[str, Row] = {}
    num_known = 0
    for row in rows:
        key = row_key(row.text)
        if key in known:
            num_known += 1
        else:
            kept.setdefault(key, row)
    return list(kept.values()), num_known


def read_licences(data: Path) -> Licences:
    path = data / "licences.json"
    try:
        return Licences(tuple(msgspec.json.decode(path.read_bytes(), type=_LicenceFile).yes))
    except (OSError, msgspec.MsgspecError) as error:
        raise ModerationError(f"{path} cannot be used ({error}); expected the list of sources under 'yes'") from None


def labelled_rows(data: Path, name: str) -> tuple[list[Row], DataFile]:
    """Rows of a file of `moderation/`."""
    content = _read(data / name)
    rows = [Row(r.text, r.label, r.lang, r.source, r.category) for r in _decode(data / name, content, _Labelled)]
    return rows, _describe(name, content, len(rows))


def first_user_turns(data: Path, name: str) -> tuple[list[Row], DataFile]:
    """First turns of a file of `sft/` or `prompts/`, assumed harmless."""
    conversations, file = _conversations(data, name)
    return [Row(c.turns[0].content, 0, c.lang, c.source) for c in conversations], file


def user_turns(data: Path, name: str) -> tuple[list[Row], DataFile]:
    """Every user turn of a file of conversations, assumed harmless."""
    conversations, file = _conversations(data, name)
    return [Row(m.content, 0, c.lang, c.source) for c in conversations for m in c.turns if m.role == "user"], file


def self_labelled_rows(data: Path, name: str) -> tuple[list[Row], DataFile]:
    """First user turns that we labelled ourselves: `moderation/data/labels.jsonl` has a hash, a label and a category.

    Their conversations carry no label of their own; the text stays in the data directory.
    """
    conversations, file = _conversations(data, name)
    path = Path(__file__).parent / "data" / LABELS_FILE
    labels = {label.key: label for label in _decode(path, _read_own(path), _OwnLabel)}
    rows: list[Row] = []
    for conversation in conversations:
        text = conversation.turns[0].content
        if label := labels.get(label_key(text)):
            rows.append(Row(text, label.label, conversation.lang, f"labelled:{conversation.source}", label.category))
    return rows, DataFile(f"{file.name} labelled", file.sha256, file.rows)


def label_key(text: str) -> str:
    """What `labels.jsonl` knows a text by."""
    return hashlib.sha256(row_key(text).encode("utf-8", "replace")).hexdigest()[:16]


def answers(data: Path, name: str) -> tuple[list[Row], DataFile]:
    """Last assistant turns of a file of `sft/`, assumed harmless."""
    conversations, file = _conversations(data, name)
    return [Row(c.turns[-1].content, 0, c.lang, c.source) for c in conversations], file


def conversations(data: Path, name: str) -> list[tuple[str, list[Turn]]]:
    """(source, turns) of a file of `sft/` or `prompts/`."""
    records, _ = _conversations(data, name)
    return [(c.source, [Turn(m.role, m.content) for m in c.turns]) for c in records]


def documents(data: Path, name: str) -> tuple[list[Row], DataFile]:
    """Documents of a file of `pretrain/`: books, assumed harmless."""
    content = _read(data / name)
    rows = [Row(d.text, 0, d.lang, d.source) for d in _decode(data / name, content, _Document)]
    return rows, _describe(name, content, len(rows))


def check_list(name: str) -> list[Row]:
    """One of our own lists in `moderation/data/`: sentences that must pass, or that must not."""
    path = Path(__file__).parent / "data" / name
    return [Row(r.text, r.label, r.lang, r.source, r.category) for r in _decode(path, _read_own(path), _Labelled)]


def _read_own(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModerationError(f"{path} cannot be read ({error.strerror}); it is part of the source tree") from None


def _conversations(data: Path, name: str) -> tuple[list[_Conversation], DataFile]:
    content = _read(data / name)
    records = [record for record in _decode(data / name, content, _Conversation) if record.turns]
    return records, _describe(name, content, len(records))


def _read(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        cure = "name the directory with --data or CAUSERIE_DATA"
        raise ModerationError(f"{path} cannot be read ({error}); {cure}") from None


def _decode(path: Path, content: bytes, kind: type[Decoded]) -> Iterator[Decoded]:
    decoder = msgspec.json.Decoder(kind)
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            yield decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise ModerationError(f"{path} line {number}: {error}") from None


def _describe(name: str, content: bytes, rows: int) -> DataFile:
    return DataFile(name, hashlib.sha256(content).hexdigest(), rows)
