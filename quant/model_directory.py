"""The model directory: its manifest `causerie.json`, its content hash, and how one is published whole or not at all.

Knows file names and hashes only; what the weights mean is up to the readers. Every stage that writes a model directory
(preparation, quantisation, later the training stages) goes through `publish_directory` and `write_manifest`.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias, cast, get_args

from quant.errors import CheckpointError

JsonValue: TypeAlias = "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
Stage: TypeAlias = Literal["source", "pretrain", "sft", "reward", "ppo", "dpo", "grpo", "merge", "quantize"]

MANIFEST_NAME = "causerie.json"
MANIFEST_VERSION = 1
STAGES: tuple[Stage, ...] = get_args(Stage)
# What decides how a model answers; reports, read-mes and the manifest itself do not change the content hash.
MODEL_FILE_NAMES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "quantize_config.json",
        "model.safetensors.index.json",
    }
)
_TEMPORARY_MARK = ".partial-"


@dataclass(frozen=True, slots=True)
class Parent:
    """A model that this one was made from: a name without a path, and the content hash of its directory or file."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of rows that a model was made with.

    rows:    rows used of it, also by source in `sources` where that is known
    licence: "yes" if every row used may ship in weights, "no" if one may not; None if nobody looked
    """

    name: str
    sha256: str
    rows: int
    sources: Mapping[str, int] = field(default_factory=dict[str, int])
    licence: Literal["yes", "no"] | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of `causerie.json`. `chat_format_sha256` is None for models without a chat format."""

    stage: Stage
    parents: tuple[Parent, ...] = ()
    data: tuple[DataFile, ...] = ()
    config: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])
    seed: int | None = None
    metrics: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])
    chat_format_sha256: str | None = None
    version: int = MANIFEST_VERSION


def write_manifest(directory: Path, manifest: Manifest) -> None:
    record = {
        "version": manifest.version,
        "stage": manifest.stage,
        "parents": [{"name": parent.name, "sha256": parent.sha256} for parent in manifest.parents],
        "data": [_record_of_data_file(data) for data in manifest.data],
        "config": manifest.config,
        "seed": manifest.seed,
        "metrics": manifest.metrics,
        "chat_format_sha256": manifest.chat_format_sha256,
    }
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
    (directory / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> Manifest | None:
    """Returns None where there is no manifest. Raises CheckpointError where there is one that cannot be understood."""
    path = directory / MANIFEST_NAME
    if not path.is_file():
        return None
    record = _read_object(path)
    version = record.get("version")
    if version != MANIFEST_VERSION:
        raise CheckpointError(
            f"{path} has manifest version {version!r}; this program reads {MANIFEST_VERSION}: update causerie, "
            "or prepare the model again"
        )
    try:
        return _manifest_from_record(record)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a valid manifest ({error!s}); prepare the model again") from error


def _manifest_from_record(record: Mapping[str, object]) -> Manifest:
    stage = record["stage"]
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}, expected one of {', '.join(STAGES)}")
    seed, chat_format = record.get("seed"), record.get("chat_format_sha256")
    if seed is not None and not isinstance(seed, int):
        raise TypeError("seed is not a whole number")
    if chat_format is not None and not isinstance(chat_format, str):
        raise TypeError("chat_format_sha256 is not a string")
    parents = [Parent(str(row["name"]), str(row["sha256"])) for row in _objects(record, "parents")]
    data = [_data_file_from_record(row) for row in _objects(record, "data")]
    return Manifest(
        stage=stage,
        parents=tuple(parents),
        data=tuple(data),
        config=_object(record, "config"),
        seed=seed,
        metrics=_object(record, "metrics"),
        chat_format_sha256=chat_format,
    )


def _record_of_data_file(data: DataFile) -> Mapping[str, JsonValue]:
    record: dict[str, JsonValue] = {"name": data.name, "sha256": data.sha256, "rows": data.rows}
    if data.sources:
        record["sources"] = data.sources
    if data.licence is not None:
        record["licence"] = data.licence
    return record


def _data_file_from_record(record: Mapping[str, object]) -> DataFile:
    licence = record.get("licence")
    if licence not in ("yes", "no", None):
        raise ValueError(f"licence is {licence!r}, expected yes or no")
    sources = {source: int(str(rows)) for source, rows in _object(record, "sources").items()}
    return DataFile(
        str(record["name"]), str(record["sha256"]), int(str(record["rows"])), sources=sources, licence=licence
    )


def _objects(record: Mapping[str, object], key: str) -> list[Mapping[str, object]]:
    value = record.get(key, [])
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in cast(list[object], value)):
        raise TypeError(f"{key} is not a list of objects")
    return cast(list[Mapping[str, object]], value)


def _object(record: Mapping[str, object], key: str) -> Mapping[str, JsonValue]:
    value = record.get(key, {})
    if not isinstance(value, dict):
        raise TypeError(f"{key} is not an object")
    return cast(Mapping[str, JsonValue], value)


def _read_object(path: Path) -> Mapping[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return cast(Mapping[str, object], value)


@contextlib.contextmanager
def publish_directory(target: Path) -> Generator[Path]:
    """Yields an empty sibling of `target` to write into; it takes `target`'s name when the block ends without error.

    Until then `target` is untouched, and after an error nothing is left beside it. A directory already at `target` is
    replaced. Callers that race for one target must hold a lock.
    """
    target = target.resolve()  # a link keeps pointing to where its owner wants the files
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}{_TEMPORARY_MARK}{os.getpid()}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        yield temporary
        # safetensors makes its files readable by their owner only; a model may be served by another user.
        readable_by = temporary.stat().st_mode & 0o666
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(readable_by)
                _flush_to_disk(path)
        _replace_directory(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_directory(source: Path, target: Path) -> None:
    # A directory cannot be renamed over one that holds files, so the old one steps aside first.
    retired = source.with_name(source.name + "-old")
    if target.exists():
        target.rename(retired)
    try:
        source.rename(target)
    except OSError:
        if retired.exists():
            retired.rename(target)
        raise
    _flush_to_disk(target.parent)
    shutil.rmtree(retired, ignore_errors=True)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(parent: Path) -> list[Path]:
    """Removes temporary directories that killed writers left in `parent`. Returns what was removed.

    Only for a caller that holds the lock on `parent`: a directory that is still being written looks the same.
    """
    leftovers = [path for path in parent.glob(f".*{_TEMPORARY_MARK}*") if path.is_dir()]
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return leftovers


def remove_leftovers_of(target: Path) -> list[Path]:
    """As above, of this one target and of writers that are no more: other directories beside it are left alone."""
    target = target.absolute()
    found = target.parent.glob(f".{glob.escape(target.name)}{_TEMPORARY_MARK}*")
    leftovers = [path for path in found if path.is_dir() and not _is_writer_alive(path)]
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return leftovers


def _is_writer_alive(temporary: Path) -> bool:
    number = temporary.name.rpartition(_TEMPORARY_MARK)[2].partition("-")[0]
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):
        return True  # not one of ours, or another user's process
    return True


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_directory(directory: Path) -> str:
    """SHA-256 over the names and contents of the files that decide how the model answers (`MODEL_FILE_NAMES` and the
    safetensors files), independent of where the directory lies."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir(), key=lambda path: path.name):
        if path.is_file() and (path.name in MODEL_FILE_NAMES or path.suffix == ".safetensors"):
            digest.update(f"{path.name}\0{hash_file(path)}\n".encode())
    return digest.hexdigest()
