"""What a search for a perplexity budget has measured, beside its walks: an interrupted one measures nothing twice.

One JSON file of lists of numbers by key. Whoever gives a key says what the numbers are.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

logger = logging.getLogger(__name__)


class BudgetRecord:
    """Written whole at every change; a file that cannot be read counts as empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values = _read(path)

    def get(self, key: str) -> Sequence[float] | None:
        return self._values.get(key)

    def put(self, key: str, values: Sequence[float]) -> None:
        self._values[key] = list(values)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self._values, indent=1) + "\n", encoding="utf-8")
        partial.replace(self._path)

    def measured(self, key: str, measure: Callable[[], Sequence[float]]) -> Sequence[float]:
        """What is known under the key, else what `measure` returns, which is known from then on."""
        known = self.get(key)
        if known is None:
            known = measure()
            self.put(key, known)
        return known


def _read(path: Path) -> dict[str, list[float]]:
    if not path.is_file():
        return {}
    try:
        content = cast("dict[str, list[float]]", json.loads(path.read_text(encoding="utf-8")))
        return {str(key): [float(value) for value in values] for key, values in content.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("budget_record_is_made_anew path=%s reason=%s", path, error)
        return {}
