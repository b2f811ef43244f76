"""The rows that the classifier is trained on: sources that the licence rule allows, and our own written phrases.

A text that occurs in a validation or test file, or in one of our own check lists, is left out of every source and
counted. Reads files only; `moderation.train` decides what to do with the rows.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from moderation.policy import WindowOptions, split_windows
from moderation.rows import (
    DataFile,
    Licences,
    Row,
    answers,
    check_list,
    documents,
    drop_known,
    first_user_turns,
    labelled_rows,
    read_licences,
    row_key,
    self_labelled_rows,
    user_turns,
)
from moderation.written import expand_phrases, written_directory

__all__ = [
    "CHECK_LISTS",
    "DEV_FILE",
    "MEANT_AS_HARMFUL",
    "TRAINING_WINDOWS",
    "VALIDATION_FILES",
    "Corpus",
    "LicenceRule",
    "collect_corpus",
    "list_test_files",
    "training_pieces",
    "vocabulary_texts",
]

LicenceRule = Literal["yes", "all"]
CHECK_LISTS = ("everyday.jsonl", "blatant.jsonl")
TRAIN_FILE = "moderation/train.jsonl.gz"
DEV_FILE = "moderation/dev.jsonl.gz"
FIRST_TURN_FILES = ("sft/train_en.jsonl.gz", "sft/train_zh.jsonl.gz")
PREFERENCE_FILE = "preference/train.jsonl.gz"
BOOK_FILES = ("pretrain/en_00.jsonl.gz", "pretrain/zh_00.jsonl.gz")
VALIDATION_FILES = ("sft/val.jsonl.gz", "prompts/val.jsonl.gz")
# Their prompts ask for harm by design and carry no label, so they are nobody's harmless rows.
MEANT_AS_HARMFUL = ("safety_tuned_refusals", "hh_harmless_base")
# Shorter than the policy's: what is learnt from short pieces holds in longer ones, and the other way round it dilutes.
TRAINING_WINDOWS = WindowOptions(window_chars=300, stride_chars=150)
SHORTEST_PASSAGE_CHARS = 200
MAX_PIECES = 4
# Posts and tweets are long already, and what is harmful in them is rarely one sentence.
POST_SOURCES = ("cold", "davidson_tweets", "vicomtech_stormfront")


@dataclass(frozen=True, slots=True)
class Corpus:
    """`removed`: rows left out for occurring in a validation, test or check file, by the file that offered them."""

    rows: list[Row]
    files: list[DataFile]
    removed: dict[str, int]

    def counts(self) -> dict[str, int]:
        """Rows by 'source label', sorted."""
        return dict(sorted(Counter(f"{row.source} {row.label}" for row in self.rows).items()))


def collect_corpus(data: Path, licences: LicenceRule, rows_per_line: int, passages: int, seed: int) -> Corpus:
    """Training rows in a fixed order. Raises ModerationError if a file is missing or malformed."""
    allowed = read_licences(data)
    known = _known_keys(data)
    rows: list[Row] = []
    files: list[DataFile] = []
    removed: dict[str, int] = {}
    rng = random.Random(seed)  # noqa: S311 - draws passages, guards no secret
    for offered, file in _offered(data, passages, rng):
        usable = [row for row in offered if _usable(row, allowed, licences)]
        kept, removed[file.name] = drop_known(usable, known)
        known.update(row_key(row.text) for row in kept)
        rows += kept
        files.append(file)
    written, removed["written"] = drop_known(expand_phrases(written_directory(), seed, rows_per_line), known)
    rows += written
    return Corpus(rows + _hidden_in_passages(rows, rng), files, removed)


def vocabulary_texts(data: Path, corpus: Corpus, licences: LicenceRule) -> Iterator[str]:
    """The training rows, and whole answers and books: what the encoder's vocabulary is chosen by."""
    allowed = read_licences(data)
    yield from (row.text for row in corpus.rows)
    for name in FIRST_TURN_FILES:
        yield from (row.text for row in answers(data, name)[0] if _usable(row, allowed, licences))
    for name in BOOK_FILES:
        # A third of the English books has nearly all of their words.
        rows = [row for row in documents(data, name)[0] if _usable(row, allowed, licences)]
        yield from (row.text for row in (rows[::3] if rows and rows[0].lang == "en" else rows))


def list_test_files(data: Path) -> list[str]:
    return [f"moderation/{path.name}" for path in sorted((data / "moderation").glob("test_*.jsonl.gz"))]


def training_pieces(row: Row, windows: WindowOptions) -> list[str]:
    """A long harmless text is harmless in every window, as the policy will see it; of a harmful one we cannot know."""
    if row.label == 1:
        return [row.text[: windows.joined_chars]]
    return split_windows(row.text, windows)[:MAX_PIECES]


def _known_keys(data: Path) -> set[str]:
    held_out = [labelled_rows(data, name)[0] for name in (DEV_FILE, *list_test_files(data))]
    held_out += [user_turns(data, name)[0] for name in VALIDATION_FILES]
    held_out += [check_list(name) for name in CHECK_LISTS]
    return {""} | {row_key(row.text) for rows in held_out for row in rows}


def _offered(data: Path, passages: int, rng: random.Random) -> list[tuple[list[Row], DataFile]]:
    offered = [labelled_rows(data, TRAIN_FILE)]
    offered += [first_user_turns(data, name) for name in FIRST_TURN_FILES]
    offered.append(user_turns(data, PREFERENCE_FILE))
    offered.append(self_labelled_rows(data, PREFERENCE_FILE))
    for name in FIRST_TURN_FILES:
        rows, file = answers(data, name)
        offered.append((_passages(rows, passages, rng), DataFile(f"{file.name} answers", file.sha256, file.rows)))
    for name in BOOK_FILES:
        rows, file = documents(data, name)
        offered.append((_passages(rows, passages, rng), file))
    return offered


def _passages(rows: Sequence[Row], count: int, rng: random.Random) -> list[Row]:
    """One passage of a window's length from each of up to `count` long texts."""
    size = TRAINING_WINDOWS.window_chars
    long_rows = [row for row in rows if len(row.text) >= SHORTEST_PASSAGE_CHARS]
    drawn = rng.sample(long_rows, min(count, len(long_rows)))
    starts = [rng.randrange(max(1, len(row.text) - size)) for row in drawn]
    return [
        Row(row.text[start : start + size], 0, row.lang, f"passage:{row.source}")
        for row, start in zip(drawn, starts, strict=True)
    ]


def _hidden_in_passages(rows: Sequence[Row], rng: random.Random) -> list[Row]:
    """Harmful requests inside harmless text that fills up a window: what a window of a long message may look like."""
    passages = [row for row in rows if row.source.startswith("passage:")]
    harmful = [row for row in rows if row.label == 1 and row.source not in POST_SOURCES]
    hidden: list[Row] = []
    for lang in ("en", "zh"):
        around = [row.text for row in passages if row.lang == lang]
        candidates = [row for row in harmful if row.lang == lang]
        for row in rng.sample(candidates, min(len(around), len(candidates) // 4)):
            before, after = rng.choice(around), rng.choice(around)
            cut = rng.randrange(60 if lang == "en" else 20)
            text = f"{before[len(before) - cut :]} {row.text} {after}"
            window = split_windows(text, TRAINING_WINDOWS)[0]
            hidden.append(replace(row, text=window, source=f"hidden:{row.source}"))
    return hidden


def _usable(row: Row, allowed: Licences, licences: LicenceRule) -> bool:
    is_unlabelled = row.source.removeprefix("passage:") in MEANT_AS_HARMFUL
    return not is_unlabelled and (licences == "all" or allowed.allow(row.source.rpartition(":")[2]))
