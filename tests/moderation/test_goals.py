from __future__ import annotations

from dataclasses import replace

import pytest

from moderation.goals import Figure, headline_figures, headline_measure
from moderation.latency import Latency
from moderation.report import CheckListReport, OrdinaryReport, Report
from tests.moderation.test_gate import MEASURES, file_report

pytestmark = pytest.mark.unit

ORDINARY = OrdinaryReport("sft/val.jsonl.gz", 1000, 9, 900, 3, 100, 6, 4)


def figures_of(report: Report, weights_bytes: int | None = None) -> dict[str, Figure]:
    return {figure.about: figure for figure in headline_figures(report, weights_bytes)}


def test_ordinary_rows_are_judged_literally_and_without_those_meant_as_harmful() -> None:
    figures = figures_of(Report("m", [], [ORDINARY], 0.4))

    everything, ordinary = figures.values()
    assert (everything.value, everything.is_met) == (0.009, False)
    assert (ordinary.value, ordinary.is_met) == (pytest.approx(3 / 900), True)
    assert "all rows" in everything.about
    assert "without those written to be harmful" in ordinary.about


def test_shares_at_the_threshold_are_counted_from_the_measures() -> None:
    # 100 rows, 50 harmful, recall 0.8, 10 % of the 50 harmless ones refused.
    tests = [file_report(name) for name in ("test_xstest", "test_user_prompts_crossdomain", "test_surge_toxicity")]
    figures = figures_of(Report("m", tests, [], 0.4))

    safe, requests = figures["test_xstest, safe half refused"], figures["test_user_prompts_crossdomain, recall"]
    assert (safe.counted, safe.goal, safe.is_met) == (replace(safe).counted, 0.10, True)
    assert safe.counted is not None
    assert (safe.counted.hits, safe.counted.count) == (5, 50)
    assert requests.counted is not None
    assert (requests.counted.hits, requests.counted.count, requests.is_met) == (40, 50, True)
    assert figures["test_surge_toxicity, AUROC"].is_met is False
    assert figures["test_xstest, calibration error"].is_met is True


@pytest.mark.parametrize(
    ("name", "measure", "value"),
    [("test_xstest", "AUROC", 0.9), ("test_openai_moderation", "AUPRC", 0.8), ("test_of_ours", "AUPRC", 0.8)],
)
def test_each_file_has_its_measure_and_one_without_a_goal_has_auprc(name: str, measure: str, value: float) -> None:
    assert headline_measure(file_report(name)) == (measure, value)


def test_a_file_without_a_goal_is_shown_and_neither_met_nor_missed() -> None:
    assert figures_of(Report("m", [file_report("test_of_ours")], [], 0.4))["test_of_ours, AUPRC"].is_met is None


def test_latency_size_and_check_lists_have_goals() -> None:
    report = Report("m", [], [], 0.4, check_lists=[CheckListReport("everyday.jsonl", 60, ["kill weeds"])])
    report = replace(report, latencies=[Latency("test files", 64, 200, 7.9, 25.1)])
    figures = figures_of(report, 31_000_000)

    met = {about: figure.is_met for about, figure in figures.items()}
    assert met == {
        "everyday.jsonl: sentences judged wrongly": False,
        "one message of 64 tokens, test files, p50": True,
        "one message of 64 tokens, test files, p99": False,
        "weights": False,
    }


def test_a_second_stage_may_take_longer() -> None:
    report = Report("m", [], [], 0.4, latencies=[Latency("test files", 64, 200, 7.9, 59.0)])

    assert [figure.is_met for figure in headline_figures(report)] == [True, False]
    assert [figure.is_met for figure in headline_figures(report, is_cascade=True)] == [True, True]


def test_what_was_not_measured_is_not_shown_as_met() -> None:
    unknown = replace(file_report("test_xstest"), overall=replace(MEASURES, auroc=None, false_positive_rate=None))

    assert "test_xstest, AUROC" not in figures_of(Report("m", [unknown], [], 0.4))
