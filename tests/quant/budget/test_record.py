"""What a search has measured, on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from quant.budget.record import BudgetRecord

pytestmark = pytest.mark.unit


def never() -> list[float]:
    raise AssertionError("measured twice")


def test_what_was_measured_is_known_to_the_next_run_digit_by_digit(tmp_path: Path) -> None:
    values = [1 / 3, 2.5]
    assert BudgetRecord(tmp_path / "measured.json").measured("losses a", lambda: values) == values
    again = BudgetRecord(tmp_path / "measured.json")
    assert again.measured("losses a", never) == values
    assert again.get("losses b") is None
    assert [path.name for path in tmp_path.iterdir()] == ["measured.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": ["x"]}', '{"a": null}'])
def test_a_file_that_cannot_be_read_counts_as_empty(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "measured.json").write_text(content)
    record = BudgetRecord(tmp_path / "measured.json")
    assert record.get("a") is None
    assert "budget_record_is_made_anew" in caplog.text
    record.put("a", [1.0])
    assert BudgetRecord(tmp_path / "measured.json").get("a") == [1.0]
