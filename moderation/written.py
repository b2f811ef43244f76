"""Expands the phrase files of `moderation/data/written/` into labelled training rows. Called by training alone.

A line may hold choices `[a|b]` and names of slot lists `{name}`; `{name*}` has one value throughout a row. Ways of
asking come from `wrappers.toml`, lists that several files use from `slots.toml`: both are the same for harmful and
harmless phrases, so that no group and no way of asking speaks for a label. No test file had a part in writing them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from moderation.categories import Category
from moderation.errors import ModerationError
from moderation.rows import Row

__all__ = ["EXTENSIONS", "SLOT_FILE", "WRAPPER_FILE", "expand_phrases", "phrase_files", "written_directory"]

Decoded = TypeVar("Decoded")

WRAPPER_FILE = "wrappers.toml"
SLOT_FILE = "slots.toml"
NO_CATEGORY = "none"
# Categories of a file that are not in OpenAI's list.
EXTENSIONS = ("jailbreak",)
# Kinds written as people post, not as they ask an assistant: some of their rows are all in small or in capital letters.
POSTED_KINDS = ("comments", "posts")
SMALL_LETTERS_SHARE = 0.2
CAPITALS_SHARE = 0.05
CHOICE = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{(\w+)(\*?)\}")
SPACES = re.compile(r" {2,}")
# What putting parts together leaves behind: a space before a mark, a full stop after a question.
SURPLUS = re.compile(r" +(?=[,.?!;])|(?<=[?？])[.。]$")


@dataclass(frozen=True, slots=True)
class PhraseFile:
    label: int
    lang: str
    texts: dict[str, str]
    slots: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    category: str = NO_CATEGORY
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Writing:
    """How the lines of one kind in one file become text."""

    slots: Mapping[str, Sequence[str]]
    wrappers: Sequence[str]
    is_posted: bool


def written_directory() -> Path:
    return Path(__file__).parent / "data" / "written"


def phrase_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("*.toml") if path.name not in (WRAPPER_FILE, SLOT_FILE))


def expand_phrases(directory: Path, seed: int, rows_per_line: int) -> list[Row]:
    """Distinct rows, at most `rows_per_line` times the file's share from each line, the same for the same seed."""
    rng = random.Random(seed)  # noqa: S311 - draws phrases, guards no secret
    wrappers = _read(directory / WRAPPER_FILE, dict[str, dict[str, list[str]]])
    common = _read(directory / SLOT_FILE, dict[str, dict[str, list[str]]])
    rows: dict[str, Row] = {}
    for path in phrase_files(directory):
        phrases = _read(path, PhraseFile)
        if phrases.category not in (NO_CATEGORY, *Category, *EXTENSIONS):
            raise ModerationError(f"phrase file {path} has the category {phrases.category!r}, which is unknown")
        slots = common[phrases.lang] | phrases.slots
        source = f"written_{path.stem}"
        for kind, lines in phrases.texts.items():
            writing = Writing(slots, wrappers[phrases.lang][kind], is_posted=kind in POSTED_KINDS)
            for line in filter(None, map(str.strip, lines.splitlines())):
                for _ in range(round(rows_per_line * phrases.share)):
                    text = _write(line, writing, rng)
                    rows.setdefault(text, Row(text, phrases.label, phrases.lang, source, phrases.category))
    return list(rows.values())


def _write(line: str, writing: Writing, rng: random.Random) -> str:
    text = SURPLUS.sub("", rng.choice(writing.wrappers).replace("{}", _fill(line, writing.slots, rng)))
    if writing.is_posted and rng.random() < SMALL_LETTERS_SHARE:
        return text.lower()
    if writing.is_posted and rng.random() < CAPITALS_SHARE:
        return text.upper()
    return text[0].upper() + text[1:] if rng.random() < 0.5 else text


def _fill(line: str, slots: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    # Innermost choices first, so that a choice inside a choice is settled before the outer one.
    while match := CHOICE.search(line):
        line = line[: match.start()] + rng.choice(match[1].split("|")) + line[match.end() :]
    kept: dict[str, str] = {}
    while match := SLOT.search(line):
        name, is_kept = match.groups()
        if name not in slots:
            raise ModerationError(f"phrase {line!r} uses the unknown list {{{name}}}; known are {sorted(slots)}")
        value = rng.choice(slots[name])
        if is_kept:
            value = kept.setdefault(name, value)
        line = line[: match.start()] + value + line[match.end() :]
    return SPACES.sub(" ", line).strip()


def _read(path: Path, kind: type[Decoded]) -> Decoded:
    try:
        return msgspec.toml.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError) as error:
        raise ModerationError(f"phrase file {path} cannot be used: {error}") from None
