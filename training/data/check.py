"""`causerie train data`: what a stage would make of files of rows, as a table or JSON, and the cleaned rows."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import msgspec
from rich.console import Console
from rich.table import Table

from quant.model_directory import DataFile, JsonValue
from training.data.files import open_lines
from training.data.load import (
    CleaningReport,
    Loaded,
    LoadPolicy,
    load_conversations,
    load_documents,
    load_prompts,
    load_rankings,
)
from training.data.records import Row, encode_row
from training.errors import DataError, TrainingError
from training.settings import DataCheckSettings

__all__ = ["Checked", "check_files", "run"]

Kind: TypeAlias = Literal["conversations", "rankings", "prompts", "documents"]
LOADERS: Mapping[Kind, Callable[[Sequence[Path], LoadPolicy], Loaded[Any]]] = {
    "conversations": load_conversations,
    "rankings": load_rankings,
    "prompts": load_prompts,
    "documents": load_documents,
}


@dataclass(frozen=True, slots=True)
class Checked:
    """All files of one kind."""

    kind: Kind
    rows: tuple[Row, ...]
    files: tuple[DataFile, ...]
    report: CleaningReport


def run(settings: DataCheckSettings) -> None:
    """Prints to standard output. Raises DataError at the first line that is broken."""
    checked = check_files(settings)
    if settings.clean is not None:
        _write_clean(settings.clean, checked, settings.data)
    if settings.json:
        print(json.dumps([_record(part) for part in checked], ensure_ascii=False))
        return
    console = Console()
    for part in checked:
        console.print(_file_table(part), _source_table(part), f"{part.kind}: {part.report}", sep="\n")


def check_files(settings: DataCheckSettings) -> list[Checked]:
    """In the order in which a file of each kind is first named."""
    files_of_kind: dict[Kind, list[Path]] = {}
    for path in settings.data:
        kind = _kind_of(path) if settings.kind == "auto" else settings.kind
        files_of_kind.setdefault(kind, []).append(path)
    policy = LoadPolicy.from_settings(settings)
    checked: list[Checked] = []
    for kind, files in files_of_kind.items():
        loaded = LOADERS[kind](files, policy)
        checked.append(Checked(kind, cast("tuple[Row, ...]", loaded.rows), loaded.files, loaded.report))
    return checked


def _kind_of(path: Path) -> Kind:
    with open_lines(path) as lines:
        for number, line in lines:
            try:
                keys = msgspec.json.decode(line, type=dict[str, object])
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise DataError(f"{path} line {number}: {error}") from error
            if "messages" in keys:
                return "conversations"
            if "prompt" in keys:
                return "rankings" if keys.keys() & {"chosen", "answers"} else "prompts"
            if "text" in keys:
                return "documents"
            raise DataError(f"{path} line {number}: neither `messages`, `prompt` nor `text` is among its keys")
    raise DataError(f"{path} holds no row")


def _write_clean(target: Path, checked: Sequence[Checked], data: Sequence[Path]) -> None:
    if len(checked) != 1:
        kinds = " and ".join(part.kind for part in checked)
        raise TrainingError(f"{target} would hold {kinds}; clean one kind at a time")
    if not target.name.endswith((".jsonl", ".jsonl.gz")):
        raise TrainingError(f"{target} is no file of rows; expected .jsonl or .jsonl.gz")
    if target.resolve() in [path.resolve() for path in data]:
        raise TrainingError(f"{target} is one of the files that are read; name another one")
    content = b"".join(encode_row(row) + b"\n" for row in checked[0].rows)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        # Without the time, the same rows give the same file.
        partial.write_bytes(gzip.compress(content, mtime=0) if target.suffix == ".gz" else content)
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise TrainingError(f"{target} cannot be written: {error.strerror}") from error


def _record(checked: Checked) -> dict[str, JsonValue]:
    files: list[JsonValue] = [msgspec.to_builtins(file) for file in checked.files]
    return {"kind": checked.kind, "files": files, **checked.report.record()}


def _file_table(checked: Checked) -> Table:
    table = Table("file", "rows used", "may ship", "sha256")
    for file in checked.files:
        table.add_row(file.name, f"{file.rows:,}", file.licence or "not known", file.sha256[:12])
    return table


def _source_table(checked: Checked) -> Table:
    table = Table("source", "rows used", "left out for its licence")
    report = checked.report
    for source in sorted(report.sources.keys() | report.unlicensed_sources.keys()):
        kept, refused = report.sources.get(source, 0), report.unlicensed_sources.get(source, 0)
        table.add_row(source, f"{kept:,}", f"{refused:,}" if refused else "")
    return table
