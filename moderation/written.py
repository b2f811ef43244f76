"""Expands the phrase files of `moderation/data/written/` into labelled training rows. Called by training alone.

A line may hold choices `[a|b]` and names of slot lists `{name}`; ways of asking come from `wrappers.toml` and are the
same for harmful and harmless phrases. No test file had a part in writing the phrases.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from moderation.errors import ModerationError
from moderation.rows import Row

__all__ = ["PHRASE_FILES", "WRAPPER_FILE", "expand_phrases", "written_directory"]

Decoded = TypeVar("Decoded")

WRAPPER_FILE = "wrappers.toml"
PHRASE_FILES = ("en_harmful.toml", "en_harmless.toml", "zh_harmful.toml", "zh_harmless.toml")
CHOICE = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{(\w+)\}")
SPACES = re.compile(r" {2,}")


@dataclass(frozen=True, slots=True)
class PhraseFile:
    label: int
    lang: str
    slots: dict[str, list[str]]
    texts: dict[str, str]
    share: float = 1.0


def written_directory() -> Path:
    return Path(__file__).parent / "data" / "written"


def expand_phrases(directory: Path, seed: int, rows_per_line: int) -> list[Row]:
    """Distinct rows, at most `rows_per_line` times the file's share from each line, the same for the same seed."""
    rng = random.Random(seed)  # noqa: S311 - draws phrases, guards no secret
    wrappers = _read(directory / WRAPPER_FILE, dict[str, dict[str, list[str]]])
    rows: dict[str, Row] = {}
    for name in PHRASE_FILES:
        phrases = _read(directory / name, PhraseFile)
        count = round(rows_per_line * phrases.share)
        source = f"written_{name.removesuffix('.toml')}"
        for kind, lines in phrases.texts.items():
            for line in filter(None, map(str.strip, lines.splitlines())):
                for text in _expand_line(line, phrases.slots, wrappers[phrases.lang][kind], rng, count):
                    rows.setdefault(text, Row(text, phrases.label, phrases.lang, source))
    return list(rows.values())


def _expand_line(
    line: str, slots: Mapping[str, Sequence[str]], wrappers: Sequence[str], rng: random.Random, count: int
) -> list[str]:
    return [_wrap(_fill(line, slots, rng), rng.choice(wrappers), rng) for _ in range(count)]


def _fill(line: str, slots: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    # Innermost choices first, so that a choice inside a choice is settled before the outer one.
    while match := CHOICE.search(line):
        line = line[: match.start()] + rng.choice(match[1].split("|")) + line[match.end() :]
    while match := SLOT.search(line):
        if match[1] not in slots:
            raise ModerationError(f"phrase {line!r} uses the unknown list {{{match[1]}}}; known are {sorted(slots)}")
        line = line[: match.start()] + rng.choice(slots[match[1]]) + line[match.end() :]
    return SPACES.sub(" ", line).strip()


def _wrap(phrase: str, wrapper: str, rng: random.Random) -> str:
    text = wrapper.replace("{}", phrase)
    return text[0].upper() + text[1:] if rng.random() < 0.5 else text


def _read(path: Path, kind: type[Decoded]) -> Decoded:
    try:
        return msgspec.toml.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError) as error:
        raise ModerationError(f"phrase file {path} cannot be used: {error}") from None
