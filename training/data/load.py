"""Reads whole files of rows before any training: the first broken line stops everything, by file and line number.

What is left out (duplicates, rows that an evaluation file holds, rows whose source may not ship, undecided rankings) is
counted, and goes with the sources of what is kept into the model's manifest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Generic, Literal, TypeVar

import msgspec

from quant.model_directory import DataFile, JsonValue
from training.data.files import LineReader, open_lines
from training.data.licences import LICENCES_NAME, Licences, find_licences, is_named, read_licences
from training.data.overlap import EvaluationTexts, read_evaluation, row_digest
from training.data.records import (
    Conversation,
    Document,
    Prompt,
    Ranking,
    RowError,
    decode_conversation,
    decode_document,
    decode_prompt,
    decode_ranking,
)
from training.errors import DataError
from training.settings import DataSettings

__all__ = [
    "MAX_ROWS",
    "CleaningReport",
    "LoadPolicy",
    "Loaded",
    "load_conversations",
    "load_documents",
    "load_prompts",
    "load_rankings",
    "load_rows",
]

AnyRow = TypeVar("AnyRow", Conversation, Ranking, Prompt, Document)
# Rows are held in memory; this many conversations are some 10 GB.
MAX_ROWS = 5_000_000


@dataclass(frozen=True, slots=True)
class LoadPolicy:
    """Which rows are used.

    licences:      "yes" keeps only rows whose source the licences file allows to ship in weights
    licences_file: default is the nearest licences.json, from each data file's folder upwards
    exclude:       evaluation files; a row that also occurs in one of them is left out
    max_rows:      first rows that are read of each file; the rest of the file is then not checked either
    sources:       only rows of these sources are used; none named takes all. A name that ends in * is a prefix
    """

    licences: Literal["yes", "all"] = "all"
    licences_file: Path | None = None
    exclude: tuple[Path, ...] = ()
    max_rows: int | None = None
    sources: tuple[str, ...] = ()

    @classmethod
    def from_settings(cls, settings: DataSettings) -> LoadPolicy:
        return cls(settings.licences, settings.licences_file, settings.eval_data, settings.max_rows, settings.sources)


@dataclass(frozen=True, slots=True)
class CleaningReport:
    """Counts over all files: read = kept + duplicates + overlapping + unlicensed + undecided + unwanted.

    sources and unlicensed_sources: rows kept, and rows left out for their licence, by source
    licences: rows kept by what the licences file says of their source: yes, no, unknown
    """

    read: int = 0
    kept: int = 0
    duplicates: int = 0
    overlapping: int = 0
    unlicensed: int = 0
    undecided: int = 0
    unwanted: int = 0
    sources: Mapping[str, int] = field(default_factory=dict[str, int])
    unlicensed_sources: Mapping[str, int] = field(default_factory=dict[str, int])
    licences: Mapping[str, int] = field(default_factory=dict[str, int])

    def record(self) -> dict[str, JsonValue]:
        """For a manifest's metrics or a report in JSON."""
        return msgspec.to_builtins(self)

    def __str__(self) -> str:
        left_out = {
            "duplicates": self.duplicates,
            "in evaluation files": self.overlapping,
            "licence": self.unlicensed,
            "undecided": self.undecided,
            "other sources": self.unwanted,
        }
        reasons = ", ".join(f"{name} {count:,}" for name, count in left_out.items() if count)
        return f"{self.kept:,} of {self.read:,} rows" + (f" (left out: {reasons})" if reasons else "")


@dataclass(frozen=True, slots=True)
class Loaded(Generic[AnyRow]):
    """Rows in the order of the files, what the manifest says of each file, and what was left out."""

    rows: tuple[AnyRow, ...]
    files: tuple[DataFile, ...]
    report: CleaningReport


def load_conversations(files: Sequence[Path], policy: LoadPolicy) -> Loaded[Conversation]:
    """This and its siblings raise DataError at the first line that is broken, and if no row is left."""
    return load_rows(files, policy, decode_conversation)


def load_rankings(files: Sequence[Path], policy: LoadPolicy) -> Loaded[Ranking]:
    """Rankings that prefer nothing (all ranks tied, or two answers with the same text) are left out as undecided."""
    return load_rows(files, policy, decode_ranking)


def load_prompts(files: Sequence[Path], policy: LoadPolicy) -> Loaded[Prompt]:
    return load_rows(files, policy, decode_prompt)


def load_documents(files: Sequence[Path], policy: LoadPolicy) -> Loaded[Document]:
    return load_rows(files, policy, decode_document)


def load_rows(files: Sequence[Path], policy: LoadPolicy, decode: Callable[[bytes], AnyRow]) -> Loaded[AnyRow]:
    if not files:
        raise DataError("there is no data file; name one or more .jsonl files")
    evaluation = read_evaluation(policy.exclude, with_runs=decode is decode_document)
    cleaner = _Cleaner(evaluation, policy)
    rows: list[AnyRow] = []
    described: list[DataFile] = []
    for path in files:
        licences_path = _licences_path(path, policy)
        licences = None if licences_path is None else read_licences(licences_path)
        with open_lines(path) as lines:
            read = _decoded(path, lines, decode, policy.max_rows)
            kept = [row for row in read if cleaner.keeps(row, licences)]
            name = path.name if licences_path is None else _name_below(path, licences_path.parent)
            described.append(_describe(name, lines.sha256(), kept, licences))
        rows += kept
    report = cleaner.report()
    if not rows:
        raise DataError(f"no row is left of {', '.join(map(str, files))}: {report}")
    return Loaded(tuple(rows), tuple(described), report)


class _Cleaner:
    """Decides row by row, over all files, and counts."""

    def __init__(self, evaluation: EvaluationTexts, policy: LoadPolicy) -> None:
        self._evaluation, self._rule, self._sources_wanted = evaluation, policy.licences, policy.sources
        self._seen: set[bytes] = set()
        self._reasons: Counter[str] = Counter()
        self._sources: Counter[str] = Counter()
        self._unlicensed_sources: Counter[str] = Counter()
        self._licences: Counter[str] = Counter()

    def keeps(self, row: Conversation | Ranking | Prompt | Document, licences: Licences | None) -> bool:
        verdict = "unknown" if licences is None else licences.judge(row.source)
        reason = self._reason(row, verdict)
        self._reasons[reason] += 1
        if reason == "kept":
            self._sources[row.source] += 1
            self._licences[verdict] += 1
        elif reason == "unlicensed":
            self._unlicensed_sources[row.source] += 1
        if self._reasons["kept"] > MAX_ROWS:
            raise DataError(f"more than {MAX_ROWS:,} rows; use fewer files, or --max-rows to read the first of each")
        return reason == "kept"

    def report(self) -> CleaningReport:
        return CleaningReport(
            read=self._reasons.total(),
            kept=self._reasons["kept"],
            duplicates=self._reasons["duplicate"],
            overlapping=self._reasons["overlapping"],
            unlicensed=self._reasons["unlicensed"],
            undecided=self._reasons["undecided"],
            unwanted=self._reasons["unwanted"],
            sources=dict(sorted(self._sources.items())),
            unlicensed_sources=dict(sorted(self._unlicensed_sources.items())),
            licences=dict(sorted(self._licences.items())),
        )

    def _reason(self, row: Conversation | Ranking | Prompt | Document, verdict: str) -> str:
        if self._sources_wanted and not is_named(self._sources_wanted, row.source):
            return "unwanted"
        if self._rule == "yes" and verdict != "yes":
            return "unlicensed"
        if isinstance(row, Ranking) and not row.is_decided:
            return "undecided"
        if self._evaluation.overlap(row):
            return "overlapping"
        digest = row_digest(row)
        if digest in self._seen:
            return "duplicate"
        self._seen.add(digest)
        return "kept"


def _decoded(
    path: Path, lines: LineReader, decode: Callable[[bytes], AnyRow], max_rows: int | None
) -> Iterator[AnyRow]:
    for number, line in islice(lines, max_rows):
        try:
            yield decode(line)
        except (RowError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DataError(f"{path} line {number}: {error}") from error


def _licences_path(path: Path, policy: LoadPolicy) -> Path | None:
    found = policy.licences_file or find_licences(path)
    if found is None and policy.licences == "yes":
        raise DataError(f"{path}: there is no {LICENCES_NAME} beside it or above; name one with --licences-file")
    return found


def _name_below(path: Path, folder: Path) -> str:
    """As in sft/train.jsonl.gz: a manifest does not say where a folder lies, but which file of it was read."""
    resolved, folder = path.resolve(), folder.resolve()
    return resolved.relative_to(folder).as_posix() if resolved.is_relative_to(folder) else path.name


def _describe(name: str, sha256: str, kept: Sequence[AnyRow], licences: Licences | None) -> DataFile:
    sources = Counter(row.source for row in kept)
    licence: Literal["yes", "no"] | None = None
    if licences is not None:
        licence = "yes" if all(licences.judge(source) == "yes" for source in sources) else "no"
    return DataFile(name, sha256, len(kept), sources=dict(sorted(sources.items())), licence=licence)
