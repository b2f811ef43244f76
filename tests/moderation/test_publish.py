from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moderation.errors import ModerationError
from moderation.publish import MANIFEST_FILE, read_card_facts, write_report
from moderation.report import read_report
from tests.moderation.test_card import REPORT

pytestmark = pytest.mark.unit


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    directory = tmp_path / "weights"
    directory.mkdir()
    (directory / "weights.safetensors").write_bytes(bytes(1000))
    (directory / "pr_curves.png").write_bytes(bytes(50))
    (directory / "encoder").mkdir()
    (directory / "encoder" / "weights.safetensors").write_bytes(bytes(3000))
    manifest = {"model": "words-1", "licences": "yes", "seed": 0, "rows": 2, "rows_by_source_and_label": {"cold 1": 2}}
    (directory / MANIFEST_FILE).write_text(json.dumps({**manifest, "options": {"unknown": 1}}))
    return directory


def test_report_and_card_lie_beside_the_weights_which_stay_as_they_are(weights: Path) -> None:
    before = {name: (weights / name).read_bytes() for name in ("weights.safetensors", MANIFEST_FILE)}

    names = write_report(REPORT, weights, weights)

    assert all((weights / name).is_file() for name in names)
    assert read_report(weights / "report.json") == REPORT
    assert (weights / "README.md").read_text(encoding="utf-8").startswith("# words-1\n")
    assert {name: (weights / name).read_bytes() for name in before} == before


def test_report_may_be_written_elsewhere(weights: Path, tmp_path: Path) -> None:
    write_report(REPORT, weights, tmp_path / "new" / "folder")

    assert (tmp_path / "new" / "folder" / "README.md").is_file()
    assert not (weights / "README.md").exists()


def test_size_of_the_weights_counts_neither_card_nor_plots(weights: Path) -> None:
    expected = 1000 + 3000 + (weights / MANIFEST_FILE).stat().st_size
    write_report(REPORT, weights, weights)

    assert read_card_facts(weights).weights_bytes == expected


def test_a_report_on_other_weights_is_not_put_beside_these(weights: Path) -> None:
    with pytest.raises(ModerationError, match="is of words-1, and words-2 was judged"):
        write_report(replace(REPORT, model="words-2"), weights, weights)


@pytest.mark.parametrize("content", [None, "[]", "{}"])
def test_weights_without_a_usable_manifest_are_refused_with_a_cure(weights: Path, content: str | None) -> None:
    (weights / MANIFEST_FILE).unlink() if content is None else (weights / MANIFEST_FILE).write_text(content)

    with pytest.raises(ModerationError, match="causerie train moderation"):
        read_card_facts(weights)
