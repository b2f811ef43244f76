"""Attempts at a result within its budget, with a search and results that are made up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest
import torch

from quant.budget import attempts as budget_attempts
from quant.budget.attempts import OverBudgetError, keep_budget
from quant.budget.order import BudgetUnreachableError, Refinement, SearchResult
from quant.budget.search import KnownLosses, SearchRun, Walked
from quant.errors import QuantizationError
from quant.formats.checkpoint_format import CheckpointFormat
from quant.formats.checkpoint_names import checkpoint_names
from quant.options import QuantizeOptions
from quant.progress import SilentProgress
from quant.report.measure import Agreement
from quant.report.quantization_report import BudgetTrial, QuantizationReport
from quant.walk.layer_files import WorkDirectory
from quant.walk.layer_source import LayerSource
from tests.quant.report.test_quantization_report import REPORT, WEB
from tests.quant.tiny_models import CONFIG

pytestmark = pytest.mark.unit

SOURCE = 10.0


def report(plain: float, served: float, **changes: int) -> QuantizationReport:
    """With these increases in percent on its only text."""
    paths = [Agreement(SOURCE * (1 + percent / 100), 0.9, 0.1, 0.2) for percent in (plain, served)]
    text = replace(WEB, source_perplexity=SOURCE, plain=paths[0], served=paths[1])
    return replace(REPORT, texts=(text,), **changes)


@dataclass(slots=True)
class MadeUpSearch:
    """Finds what is asked for to the digit; `base` is what a trial of the first walk would measure, in percent."""

    work: WorkDirectory
    base: float = 5.0
    asked: list[tuple[float, KnownLosses]] = field(default_factory=list[tuple[float, KnownLosses]])

    def find(self, limit_percent: float, known: KnownLosses) -> SearchResult:
        self.asked.append((limit_percent, known))
        if limit_percent < 0.5:
            raise BudgetUnreachableError(limit_percent, 0.5, 14)
        return SearchResult((), limit_percent, (BudgetTrial(len(self.asked), 100, limit_percent),))

    def losses(self, refinements: Sequence[Refinement], stage: str) -> Sequence[float]:
        assert not refinements
        return [math.log(SOURCE * (1 + self.base / 100))]

    def mixture(self, refinements: Sequence[Refinement]) -> Walked:
        return Walked(self.work.within(f"mixture-{len(self.asked)}"), ())


@dataclass(slots=True)
class MadeUpResults:
    """One report after another; those over the limit are refused."""

    reports: list[QuantizationReport]
    limit: float
    trials: list[Sequence[BudgetTrial]] = field(default_factory=list[Sequence[BudgetTrial]])

    def __call__(self, walked: Walked, trials: Sequence[BudgetTrial]) -> QuantizationReport:
        self.trials.append(tuple(trials))
        made = self.reports.pop(0)
        if made.perplexity_increase_percent > self.limit:
            raise OverBudgetError(made, self.limit)
        return made


@pytest.fixture
def run(tmp_path: Path) -> SearchRun:
    work = WorkDirectory(tmp_path, checkpoint_names(CONFIG), CheckpointFormat.V1)
    texts = [torch.zeros((1, 8), dtype=torch.int64)]
    source = cast("LayerSource", None)  # only the search would read it
    return SearchRun(source, Walked(work, ()), texts[0], texts, QuantizeOptions(), SilentProgress())


@pytest.fixture
def search(run: SearchRun, monkeypatch: pytest.MonkeyPatch) -> MadeUpSearch:
    made_up = MadeUpSearch(run.base.work)

    def open_search(run: SearchRun) -> MadeUpSearch:
        return made_up

    monkeypatch.setattr(budget_attempts, "BudgetSearch", open_search)
    return made_up


def test_what_the_serving_path_adds_is_expected_of_every_mixture(run: SearchRun, search: MadeUpSearch) -> None:
    make = MadeUpResults([report(5.0, 5.5), report(1.4, 1.9)], limit=2.0)
    assert keep_budget(run, 2.0, make).perplexity_increase_percent == pytest.approx(1.9)
    ((aim, known),) = search.asked
    assert aim == 2.0
    assert known.percent(known.base) == pytest.approx(5.5)
    assert known.percent([math.log(SOURCE)]) == pytest.approx(100 * (1.055 / 1.05 - 1))
    assert make.trials == [(), (BudgetTrial(1, 100, 2.0),)]


def test_embeddings_of_its_own_are_what_the_result_has_more_than_a_trial(run: SearchRun, search: MadeUpSearch) -> None:
    make = MadeUpResults([report(6.0, 6.5, embedding_bits=8), report(1.0, 1.0)], limit=2.0)
    keep_budget(run, 2.0, make)
    ((_, known),) = search.asked
    assert known.percent(known.base) == pytest.approx(6.5)
    assert known.percent([math.log(SOURCE)]) == pytest.approx(100 * (1.065 / 1.05 - 1))


def test_an_attempt_that_misses_the_limit_lowers_the_aim_by_as_much(run: SearchRun, search: MadeUpSearch) -> None:
    make = MadeUpResults([report(5.0, 5.0), report(2.2, 2.3), report(1.7, 1.8)], limit=2.0)
    keep_budget(run, 2.0, make)
    assert [aim for aim, _ in search.asked] == pytest.approx([2.0, 1.7])
    assert len(make.trials[-1]) == 2
    assert [path.name for path in run.base.work.path.iterdir() if path.is_dir()] == ["mixture-2"]


def test_attempts_come_to_an_end(run: SearchRun, search: MadeUpSearch) -> None:
    make = MadeUpResults([report(5.0, 5.0), *[report(2.1, 2.1)] * 3], limit=2.0)
    with pytest.raises(QuantizationError, match=r"rose by 2\.10 %, more than the 2 % allowed after 3 attempts"):
        keep_budget(run, 2.0, make)
    make = MadeUpResults([report(4.0, 4.0)] * 3, limit=2.0)
    with pytest.raises(BudgetUnreachableError, match=r"within 2 %: the best that was reached is \+2\.50 %"):
        keep_budget(run, 2.0, make)


def test_the_first_result_is_made_again_only_where_it_would_keep_the_limit(
    run: SearchRun, search: MadeUpSearch
) -> None:
    with pytest.raises(IndexError):
        keep_budget(run, 2.0, MadeUpResults([report(5.0, 5.5)], limit=2.0))
    make = MadeUpResults([report(1.8, 1.9)], limit=2.0)
    keep_budget(run, 2.0, make)
    assert [len(trials) for trials in make.trials] == [1]
    make = MadeUpResults([report(5.0, 5.5)], limit=6.0)
    keep_budget(run, 6.0, make)
    assert [len(trials) for trials in make.trials] == [0]
