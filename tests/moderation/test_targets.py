from __future__ import annotations

import math

import pytest

from moderation.rows import Row
from moderation.targets import MAY_ALSO_BE, OF_NAME, OF_SOURCE, OUTPUTS, category_of, rows_by_category, targets_of

pytestmark = pytest.mark.unit


def row(label: int = 1, source: str = "s", category: str = "none") -> Row:
    return Row("text", label, "en", source, category)


def by_name(of: Row) -> dict[str, float]:
    return dict(zip(OUTPUTS, targets_of(of), strict=True))


def test_a_harmless_row_is_no_everywhere() -> None:
    assert set(targets_of(row(label=0, category="hate"))) == {0.0}


def test_a_source_without_categories_teaches_the_decision_only() -> None:
    targets = by_name(row(category="harmful_request"))

    assert targets.pop("harmful") == 1.0
    assert targets.pop("jailbreak") == 0.0
    assert all(math.isnan(value) for value in targets.values())


def test_a_sub_category_belongs_to_its_parent() -> None:
    targets = by_name(row(category="hate/threatening"))

    assert (targets["hate/threatening"], targets["hate"]) == (1.0, 1.0)
    assert math.isnan(targets["violence"])
    assert targets["sexual"] == 0.0


def test_a_parent_leaves_its_sub_categories_open() -> None:
    assert math.isnan(by_name(row(category="self-harm"))["self-harm/intent"])
    assert math.isnan(by_name(row(source="cold", category="race"))["hate/threatening"])


@pytest.mark.parametrize(
    ("source", "category", "expected"),
    [
        ("cold", "gender", "hate"),
        ("hidden:cold", "gender", "hate"),
        ("davidson_tweets", "offensive", "harassment"),
        ("written_en_sexual", "sexual", "sexual"),
        ("harmbench", "harmful", None),
        ("advbench", "harmful_request", None),
    ],
)
def test_names_of_sources_become_ours(source: str, category: str, expected: str | None) -> None:
    assert category_of(row(source=source, category=category)) == expected


def test_every_name_used_here_is_an_output() -> None:
    names = {*OF_NAME.values(), *OF_SOURCE.values(), *MAY_ALSO_BE, *(n for near in MAY_ALSO_BE.values() for n in near)}

    assert names <= set(OUTPUTS)
    assert set(MAY_ALSO_BE) == set(OUTPUTS[1:])


def test_counts_include_the_parent() -> None:
    rows = [row(category="hate/threatening"), row(category="hate"), row(label=0), row(category="unheard of")]

    assert rows_by_category(rows) == {"hate": 2, "hate/threatening": 1}
