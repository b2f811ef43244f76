from __future__ import annotations

from dataclasses import replace

import pytest

from moderation.card import CardFacts, StageFacts, render_card
from moderation.card_tables import escaped, learnt_from
from moderation.latency import Latency
from moderation.metrics import Share
from moderation.mutations import MUTATIONS
from moderation.report import CategoryMeasures, CheckListReport, Example, OrdinaryReport, PresetReport, Report
from moderation.robustness import MutationReport, RobustnessReport
from tests.moderation.test_gate import MEASURES, file_report

pytestmark = pytest.mark.unit

FACTS = CardFacts(
    model="words-1",
    licences="yes",
    seed=7,
    rows=1300,
    rows_by_source_and_label={
        "advbench 1": 100,
        "cold 0": 200,
        "cold 1": 300,
        "passage:classic_books/Faust 0": 10,
        "passage:classic_books/The Beetle 0": 15,
        "hidden:advbench 1": 5,
        "written_zh_harmful 1": 400,
        "gsm8k_train 0": 260,
        "hidden:labelled:hh_harmless_base 1": 10,
    },
    removed_rows_known_from_validation_or_test={"a": 3, "b": 4},
    stages=[StageFacts("words", "hashed n-grams"), StageFacts("encoder", "a small transformer", 19_400_000)],
    trained_categories=["hate"],
    rows_by_category={"hate": 4321, "violence": 5},
    weights_bytes=21_500_000,
)
HATECHECK = replace(
    file_report("test_hatecheck", auroc=0.7),
    by_category={
        "slur_h": replace(MEASURES, recall=0.9, false_positive_rate=None),
        "negate_nh": replace(MEASURES, recall=None, false_positive_rate=0.75),
        "few_h": replace(MEASURES, rows=4, recall=0.8, false_positive_rate=None),
    },
    by_language={"en": MEASURES, "zh": replace(MEASURES, recall=0.123)},
    category_scores={"hate": CategoryMeasures(40, 0.91, 0.82)},
)
REPORT = Report(
    model="words-1",
    tests=[file_report("test_xstest"), HATECHECK],
    ordinary=[OrdinaryReport("sft/val.jsonl.gz", 1000, 9, 900, 3, 100, 6, 4)],
    milliseconds_per_message=0.44,
    dev=file_report("dev"),
    presets=[PresetReport("strict", "zh", 0.25, Share(2, 200), Share(30, 40))],
    check_lists=[CheckListReport("everyday.jsonl", 60, ["kill the lights"])],
    examples=[Example("false positive", "a | b\n*c*", "en", "cold", "none", 0.987)],
    robustness=RobustnessReport(
        "words-1", 0, (MutationReport(None, "en", 40, 36, 50, 5), MutationReport(MUTATIONS[0], "en", 40, 30, 50, 6))
    ),
    latencies=[Latency("test files", 64, 200, 3.25, 66.0)],
)


@pytest.fixture(scope="module")
def card() -> str:
    return render_card(FACTS, REPORT, ["pr_curves.png"])


@pytest.mark.parametrize(
    "words",
    [
        "--licences yes --seed 7` on 1,300 rows",
        "7 rows were left out",
        "1. `words`: hashed n-grams.\n2. `encoder`: a small transformer (19.4 MB).",
        "Rows that have each category: hate 4,321.",
        "scores for hate;",
        "| first turns of sft/val.jsonl.gz refused, all rows | 0.9% (0.5% to 1.7%; 9 of 1,000) | ≤ 0.5% | **missed** |",
        "| test_hatecheck, AUROC | 0.700 | ≥ 0.780 | **missed** |",
        "| test_xstest, AUROC | 0.900 | ≥ 0.870 | met |",
        "| one message of 64 tokens, test files, p99 | 66.0 ms | ≤ 60.0 ms | **missed** |",
        "| weights | 21.5 MB | ≤ 30.0 MB | met |",
        "| strict | zh | 0.2500 | 1.00% of 200 | 75.00% of 40 |",
        "1 of 60 judged wrongly: “kill the lights”",
        f"| {MUTATIONS[0]} | en | 0.750 of 40 | 15.0 | 0.120 of 50 |",
        "| as it was | en | 0.900 of 40 |  | 0.100 of 50 |",
        f"worst disguise ({MUTATIONS[0]}) | 15.0 points | ≤ 10.0 points | **missed** |",
        "4 of 900 in sft/val.jsonl.gz",
        "![Precision against recall",
        "| hate | test_hatecheck | 40 | 0.910 | 0.820 |",
        "What it does worst in test_hatecheck: negate_nh (25% right), few_h (80% right), slur_h (90% right).",
        r"| false positive | 0.987 | cold (en) | none | a \| b \*c\* |",
        "| - zh | 100 | 0.900 | 0.800 | 0.123 |",
        r"| category | negate\_nh | 100 |  | 0.750 | 0.900 |",
    ],
)
def test_card_says_what_facts_and_report_say(card: str, words: str) -> None:
    assert words in card


def test_every_goal_that_is_missed_is_named_as_missed_once_more(card: str) -> None:
    missed = [line.split(" | ")[0].removeprefix("| ") for line in card.splitlines() if line.endswith("| **missed** |")]

    assert len(missed) == 5
    assert f"**{len(missed)} of " in card
    assert all(f"\n- {about}\n" in card for about in missed)


def test_groups_of_a_few_rows_stay_out_of_the_card(card: str) -> None:
    assert r"few\_h" not in card


def test_experiments_with_other_licences_are_said_to_be_no_release() -> None:
    assert "for experiments only" in render_card(replace(FACTS, licences="all"), REPORT)


def test_a_single_model_is_not_called_a_cascade() -> None:
    card = render_card(replace(FACTS, stages=FACTS.stages[:1]), REPORT)

    assert "One model: `words`, hashed n-grams." in card
    assert "cascade" not in card


def test_what_was_learnt_from_what_counts_every_row_once() -> None:
    found = learnt_from(FACTS.rows_by_source_and_label)

    assert sum(rows for _, rows, _ in found) == FACTS.rows
    assert ("passages of books and answers, harmless", 25, ["classic_books"]) in found
    assert ("own phrases, Chinese, harmful", 400, ["written_zh_harmful"]) in found
    assert ("harmful requests, English", 100, ["advbench"]) in found
    assert ("posts, Chinese, hateful or offensive", 300, ["cold"]) in found
    assert ("harmful requests hidden in harmless passages", 15, ["advbench", "hh_harmless_base"]) in found


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("a|b", r"a\|b"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("[x](y)", r"\[x\](y)"),
        ("a\r\n\tb", "a b"),
        ("\ud800\u202e!", "? !"),
    ],
)
def test_no_text_breaks_out_of_its_cell(text: str, cell: str) -> None:
    assert escaped(text) == cell
