"""The rows under tests/data/training: what the pipeline falls back to must load, ship and stay small."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.data import LoadPolicy, load_conversations, load_documents, load_prompts, load_rankings

pytestmark = pytest.mark.unit

FOLDER = Path(__file__).resolve().parents[2] / "data" / "training"
KEEP = LoadPolicy(licences="yes")


def without(held_out: str) -> LoadPolicy:
    return LoadPolicy(licences="yes", exclude=(FOLDER / held_out,))


def test_rows_load_may_ship_and_are_in_no_held_out_file() -> None:
    reports = [
        load_documents([FOLDER / "text.jsonl.gz"], without("text_held_out.jsonl.gz")).report,
        load_conversations([FOLDER / "conversations.jsonl.gz"], without("conversations_held_out.jsonl.gz")).report,
        load_rankings([FOLDER / "rankings.jsonl.gz"], without("rankings_held_out.jsonl.gz")).report,
        load_prompts([FOLDER / "prompts.jsonl.gz"], KEEP).report,
    ]
    assert [(report.kept, report.read - report.kept) for report in reports] == [(190, 0), (400, 0), (235, 0), (78, 0)]


def test_held_out_rows_load() -> None:
    assert load_documents([FOLDER / "text_held_out.jsonl.gz"], KEEP).report.kept == 16
    assert load_conversations([FOLDER / "conversations_held_out.jsonl.gz"], KEEP).report.kept == 53
    assert load_rankings([FOLDER / "rankings_held_out.jsonl.gz"], KEEP).report.kept == 45


def test_excerpts_stay_small_and_every_source_is_written_down() -> None:
    assert sum(file.stat().st_size for file in FOLDER.glob("*.gz")) < 500_000
    sources = (FOLDER / "SOURCES.md").read_text(encoding="utf-8")
    loaded = load_conversations([FOLDER / "conversations.jsonl.gz"], KEEP).report.sources.keys()
    ranked = load_rankings([FOLDER / "rankings.jsonl.gz"], KEEP).report.sources.keys()
    assert [source for source in {*loaded, *ranked} if f"`{source}`" not in sources] == []
    assert [file.name for file in FOLDER.glob("*.gz") if f"`{file.name}`" not in sources] == []
