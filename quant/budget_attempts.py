"""Results for a perplexity budget: first without refinements, then what the search finds, until one keeps the limit.

How a result is written and measured is the caller's (`quant.quantize_directory`).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence

from quant.budget import BudgetUnreachableError, SearchResult
from quant.budget_record import BudgetRecord
from quant.budget_search import MAX_ATTEMPTS, BudgetSearch, KnownLosses, SearchRun, Walked
from quant.errors import QuantizationError
from quant.report import BudgetTrial, QuantizationReport, TextComparison

_BETTER_QUALITY = "Try a smaller --group-size, --act-order, --asym, more --samples, --bits 8, or a higher limit"

MakeResult = Callable[[Walked, Sequence[BudgetTrial]], QuantizationReport]
"""Write, measure and publish a walk. Raises OverBudgetError, and publishes nothing, where it misses the limit."""


class OverBudgetError(Exception):
    """Perplexity rose by more than was allowed. Not for the user's eyes: a search follows."""

    def __init__(self, report: QuantizationReport, limit_percent: float) -> None:
        increase = report.perplexity_increase_percent
        super().__init__(f"perplexity rose by {increase:.2f} %, more than the {limit_percent:g} % allowed")
        self.report = report


def keep_budget(run: SearchRun, limit_percent: float, make: MakeResult) -> QuantizationReport:
    """The result without refinements if that keeps the limit, else of the smallest mixture that does.

    A mixture's losses on the plain path are known exactly; what the path that serves adds to them is taken to be what
    it adds without refinements. Where the mixture misses the limit all the same, the next attempt aims lower by that.
    Raises BudgetUnreachableError, or QuantizationError after MAX_ATTEMPTS attempts.
    """
    known = _known_losses(run.record)
    if known is None or known.percent(known.base) <= limit_percent:
        try:
            return make(run.base, ())
        except OverBudgetError as over:
            known = _remember(run.record, over.report.texts)
    search = BudgetSearch(run)
    aim, trials = limit_percent, list[BudgetTrial]()
    complaint = ""
    for _ in range(MAX_ATTEMPTS):
        found = _find(search, aim, limit_percent, known)
        trials += [trial for trial in found.trials if trial not in trials]
        mixture = search.mixture(found.refinements)
        try:
            return make(mixture, trials)
        except OverBudgetError as over:
            complaint = str(over)
            aim -= max(over.report.perplexity_increase_percent - limit_percent, 0.0)
            # At the least a hundredth below what was found, so that the next search takes another mixture.
            aim = min(aim, found.increase_percent - abs(limit_percent) / 100)
            shutil.rmtree(mixture.work.path, ignore_errors=True)
    raise QuantizationError(f"{complaint} after {MAX_ATTEMPTS} attempts; nothing was written. {_BETTER_QUALITY}")


def _find(search: BudgetSearch, aim_percent: float, limit_percent: float, known: KnownLosses) -> SearchResult:
    """Errors speak of the limit that the user gave, and of what measuring the whole result would make of the best."""
    try:
        return search.find(aim_percent, known)
    except BudgetUnreachableError as error:
        best = error.best_percent + limit_percent - aim_percent
        raise BudgetUnreachableError(limit_percent, best, error.num_refined) from error


def _known_losses(record: BudgetRecord) -> KnownLosses | None:
    """What an interrupted run measured of the result without refinements."""
    parts = [record.get(key) for key in ("source", "base", "added")]
    source, base, added = parts
    return None if source is None or base is None or added is None else KnownLosses(source, base, added)


def _remember(record: BudgetRecord, texts: Sequence[TextComparison]) -> KnownLosses:
    """texts: of the result without refinements."""
    known = KnownLosses(
        source=[math.log(text.source_perplexity) for text in texts],
        base=[math.log(text.plain.perplexity) for text in texts],
        added=[max(math.log(path.perplexity / text.plain.perplexity) for path in text.result_paths) for text in texts],
    )
    record.put("source", known.source)
    record.put("base", known.base)
    record.put("added", known.added)
    return known
