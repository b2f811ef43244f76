"""Results for a perplexity budget: first without refinements, then what the search finds, until one keeps the limit.

How a result is written and measured is the caller's (`quant.run.quantize_directory`).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quant.budget.order import BudgetUnreachableError, SearchResult
from quant.budget.record import BudgetRecord
from quant.budget.search import MAX_ATTEMPTS, BudgetSearch, KnownLosses, SearchRun, Walked
from quant.errors import QuantizationError
from quant.report.quantization_report import BudgetTrial, QuantizationReport

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
    first = _FirstResult.recorded(run.record)
    if first is None or first.increase_percent <= limit_percent:
        try:
            return make(run.base, ())
        except OverBudgetError as over:
            first = _FirstResult.of(over.report)
            first.put(run.record)
    search = BudgetSearch(run)
    known = _known_losses(first, search)
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


@dataclass(frozen=True, slots=True)
class _FirstResult:
    """The result without refinements: mean negative log-likelihood of each text, nats per token.

    worst: on the path on which it is worst
    plain: on the plain path; None where its embeddings or head are not the source's, so that no trial measures that
    """

    source: Sequence[float]
    worst: Sequence[float]
    plain: Sequence[float] | None

    @classmethod
    def of(cls, report: QuantizationReport) -> _FirstResult:
        own_ends = report.head_bits is not None or report.embedding_bits is not None
        return cls(
            source=[math.log(text.source_perplexity) for text in report.texts],
            worst=[math.log(max(path.perplexity for path in text.result_paths)) for text in report.texts],
            plain=None if own_ends else [math.log(text.plain.perplexity) for text in report.texts],
        )

    @classmethod
    def recorded(cls, record: BudgetRecord) -> _FirstResult | None:
        """What an interrupted run measured."""
        source, worst = record.get("source"), record.get("worst")
        return None if source is None or worst is None else cls(source, worst, record.get("plain"))

    def put(self, record: BudgetRecord) -> None:
        if self.plain is not None:
            record.put("plain", self.plain)
        record.put("source", self.source)
        record.put("worst", self.worst)

    @property
    def increase_percent(self) -> float:
        return max(100 * math.expm1(worst - source) for worst, source in zip(self.worst, self.source, strict=True))


def _known_losses(first: _FirstResult, search: BudgetSearch) -> KnownLosses:
    base = first.plain or search.losses((), "trial 0: no linear refined")
    return KnownLosses(first.source, base, [worst - loss for worst, loss in zip(first.worst, base, strict=True)])
