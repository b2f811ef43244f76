from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from quant.errors import CheckpointError
from quant.model_directory import (
    DataFile,
    Manifest,
    Parent,
    hash_directory,
    publish_directory,
    read_manifest,
    remove_leftovers,
    remove_leftovers_of,
    write_manifest,
)

pytestmark = pytest.mark.unit


def test_manifest_survives_a_round_trip(tmp_path: Path) -> None:
    manifest = Manifest(
        stage="quantize",
        parents=(Parent("smollm2", "ab" * 32),),
        data=(
            DataFile("calibration.jsonl", "cd" * 32, 128),
            DataFile("sft/train.jsonl", "ce" * 32, 3, sources={"ours": 2, "theirs": 1}, licence="no"),
        ),
        config={"bits": 4, "symmetric": True, "group_size": None},
        seed=0,
        metrics={"perplexity": 12.5},
        chat_format_sha256="ef" * 32,
    )
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest


def test_manifest_written_before_sources_were_counted_is_still_read(tmp_path: Path) -> None:
    data = [{"name": "calibration.jsonl", "sha256": "cd", "rows": 128}]
    (tmp_path / "causerie.json").write_text(json.dumps({"version": 1, "stage": "quantize", "data": data}))
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert manifest.data == (DataFile("calibration.jsonl", "cd", 128, sources={}, licence=None),)


def test_directory_without_manifest_has_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected an object"),
        ('{"version": 9, "stage": "sft"}', "manifest version 9"),
        ('{"version": 1, "stage": "baked"}', "stage is 'baked'"),
        ('{"version": 1}', "not a valid manifest"),
        ('{"version": 1, "stage": "sft", "parents": 3}', "parents is not a list"),
        ('{"version": 1, "stage": "sft", "parents": [{"name": "a"}]}', "sha256"),
        ('{"version": 1, "stage": "sft", "seed": "x"}', "seed"),
        ('{"version": 1, "stage": "sft", "data": [{"name": "a", "licence": "maybe"}]}', "licence is 'maybe'"),
    ],
)
def test_malformed_manifest_is_refused_with_what_was_wrong(tmp_path: Path, record: str, reason: str) -> None:
    (tmp_path / "causerie.json").write_text(record)
    with pytest.raises(CheckpointError, match=reason):
        read_manifest(tmp_path)


def test_published_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with publish_directory(target) as directory:
        (directory / "config.json").write_text("{}")
        assert not target.exists()
    assert (target / "config.json").read_text() == "{}"
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_publication_through_a_link_fills_the_directory_that_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "disk" / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    with publish_directory(tmp_path / "link") as directory:
        (directory / "config.json").write_text("{}")
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]
    assert (tmp_path / "disk" / "model" / "config.json").is_file()


def test_failed_publication_leaves_the_old_directory_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    with pytest.raises(FileNotFoundError), publish_directory(target) as directory:  # noqa: PT012
        (directory / "config.json").write_text("half")
        (directory / "absent").read_text()
    assert (target / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_publication_replaces_every_file_of_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "stale.safetensors").write_text("old")
    with publish_directory(target) as directory:
        (directory / "config.json").write_text("new")
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_leftovers_of_killed_writers_are_removed_and_models_kept(tmp_path: Path) -> None:
    (tmp_path / ".model.partial-1-ab").mkdir()
    (tmp_path / "model").mkdir()
    assert [path.name for path in remove_leftovers(tmp_path)] == [".model.partial-1-ab"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_content_hash_follows_weights_and_not_reports(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = hash_directory(tmp_path)
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "causerie.json").write_text(json.dumps({}))
    assert hash_directory(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"weightz")
    assert hash_directory(tmp_path) != before


def test_only_what_a_dead_writer_of_this_target_left_is_removed(tmp_path: Path) -> None:
    dead, alive = 2**22 + 1, os.getpid()  # above the largest process number
    for name in (f".model.partial-{dead}-ab", f".model.partial-{alive}-ab", f".other.partial-{dead}-ab", "model"):
        (tmp_path / name).mkdir()
    assert [path.name for path in remove_leftovers_of(tmp_path / "model")] == [f".model.partial-{dead}-ab"]
    assert len(list(tmp_path.iterdir())) == 3
