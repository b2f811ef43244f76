"""Every test belongs to exactly one tier, so that `scripts/test` runs each of them once and forgets none."""

from __future__ import annotations

import pytest

TIERS = {"unit", "system"}


def pytest_itemcollected(item: pytest.Item) -> None:
    tiers = {mark.name for mark in item.iter_markers()} & TIERS
    if len(tiers) != 1:
        raise pytest.UsageError(f"{item.nodeid} is marked {sorted(tiers) or 'with no tier'}; expected unit or system")
