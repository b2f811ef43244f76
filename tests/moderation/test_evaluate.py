from __future__ import annotations

from pathlib import Path

import pytest

from moderation.categories import Category
from moderation.evaluate import evaluate_policy, refused_conversations
from moderation.metrics import Share
from moderation.policy import Policy, Turn
from moderation.presets import PRESETS
from moderation.report import Report, encode_report, read_report
from quant.progress import SilentProgress
from tests.moderation.fake_classifier import WordClassifier
from tests.moderation.tiny_data import CLOSED, write_tiny_data

pytestmark = pytest.mark.unit

WORDS = {"kill": 0.9, "hate": 0.7, "杀": 0.45, "mean": 0.2}


class CountedProgress:
    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def update(self, stage: str, done: float, total: float) -> None:
        if stage == "judging":
            self.seen.append((done, total))


@pytest.fixture(scope="module")
def policy() -> Policy:
    categories = {Category.VIOLENCE: {"kill": 0.9, "hate": 0.1}, Category.SEXUAL: {"kill": 0.1}}
    return Policy(WordClassifier(WORDS, categories, {"jailbreak": {"ignore": 0.9}}))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def report(policy: Policy, data: Path) -> Report:
    return evaluate_policy(policy, data, SilentProgress())


def test_every_test_file_and_dev_are_measured(report: Report) -> None:
    assert [test.short_name for test in report.tests] == ["test_openai_moderation", "test_user_prompts_crossdomain"]
    assert report.dev is not None
    assert report.dev.overall.rows == 5


def test_flags_come_from_the_verdict_whose_threshold_is_lower_for_chinese(report: Report) -> None:
    requests = report.test("test_user_prompts_crossdomain")

    assert requests is not None
    assert requests.by_language["zh"].recall == 1.0  # 0.45 is below English's 0.5 and above Chinese's 0.4
    assert requests.by_language["en"].false_positive_rate == 0.0


def test_a_row_of_two_categories_counts_in_each_and_a_comma_in_a_name_splits_nothing(report: Report) -> None:
    openai = report.test("test_openai_moderation")

    assert openai is not None
    rows = {name: measures.rows for name, measures in openai.by_category.items()}
    assert rows == {"Suicide, Self-Harm": 2, "hate": 6, "none": 10, "violence": 12}
    assert openai.by_category["Suicide, Self-Harm"].recall == 0.0


def test_scores_of_trained_categories_are_measured_where_the_file_labels_them(report: Report) -> None:
    openai = report.test("test_openai_moderation")

    assert openai is not None
    # 12 of violence: 6 score 0.9 and 6 score 0.1; the other 12 score 0. No row is labelled sexual or jailbreak.
    assert list(openai.category_scores) == ["violence"]
    assert (openai.category_scores["violence"].rows, openai.category_scores["violence"].auroc) == (12, 1.0)


def test_groups_of_one_kind_only_are_left_out(report: Report) -> None:
    openai, requests = report.tests

    assert openai.by_source == openai.by_language == {}
    assert set(requests.by_source) == {"belle", "catqa", "free_source"}


def test_lengths_are_in_order_and_hold_every_row(report: Report) -> None:
    openai = report.tests[0]

    assert list(openai.by_length) == ["under 50", "50 to 199"]
    assert sum(measures.rows for measures in openai.by_length.values()) == openai.overall.rows


def test_ordinary_rows_are_counted_with_and_without_those_meant_as_harmful(report: Report) -> None:
    first, second = report.ordinary

    assert (first.rows, first.flagged, first.ordinary, first.ordinary_flagged) == (4, 2, 3, 1)
    assert (first.meant_as_harmful, first.meant_as_harmful_flagged) == (1, 1)
    assert first.ordinary_conversations_flagged_at_any_turn == 2  # the flagged first turn, and one at its second turn
    assert first.by_source == {CLOSED: Share(1, 1), "free_source": Share(0, 2)}
    assert second.by_language == {"en": Share(1, 1), "zh": Share(0, 1)}


def test_presets_are_counted_at_the_threshold_of_the_rows_language(report: Report) -> None:
    found = {(one.preset, one.language): one for one in report.presets}

    assert len(found) == 6
    assert found["balanced", "zh"].recall == Share(1, 1)
    assert found["lenient", "zh"].recall == Share(0, 1)
    assert found["lenient", "en"].recall == Share(1, 1)
    assert found["balanced", "en"].false_positives == Share(2, 4)
    assert found["balanced", "zh"].threshold == pytest.approx(0.4)


def test_half_of_the_ordinary_answers_are_counted_at_the_thresholds_for_answers(report: Report) -> None:
    found = {(one.preset, one.language): one for one in report.answer_presets}

    assert len(found) == 6
    # Three of val (one is of a source that asks for harm) and one of each of the other files; every other one is left.
    assert [found[preset, "en"].false_positives.count for preset in PRESETS] == [2, 2, 2]


def test_dev_rows_are_judged_under_disguises_in_each_of_their_languages(report: Report) -> None:
    assert report.robustness is not None
    undisguised = report.robustness.of(None, "en")
    assert (undisguised.harmful, undisguised.harmful_flagged, undisguised.harmless) == (3, 1, 2)
    assert len({one.mutation for one in report.robustness.results}) > 10


def test_check_lists_name_the_sentences_that_are_wrong(report: Report) -> None:
    everyday, blatant = report.check_lists

    assert everyday.wrong
    assert all(any(word in sentence for word in WORDS) for sentence in everyday.wrong)
    assert not any("kill" in sentence for sentence in blatant.wrong)


def test_examples_are_dev_and_ordinary_rows_that_may_be_shipped_and_no_test_row(report: Report) -> None:
    shown = {example.text: example.kind for example in report.examples}

    assert shown == {
        "a harmless | kill *joke*": "false positive",
        "kill weeds": "false positive",
        "quietly mean": "false negative",
    }


def test_conversations_are_refused_at_any_user_turn() -> None:
    policy = Policy(WordClassifier({"kill": 0.9}))
    calm = [Turn("user", "hello"), Turn("assistant", "hi"), Turn("user", "bye")]
    late = [Turn("user", "hello"), Turn("assistant", "hi"), Turn("user", "kill him")]

    assert refused_conversations(policy, [calm, late, calm]) == 1


def test_progress_rises_to_its_total(policy: Policy, data: Path) -> None:
    progress = CountedProgress()

    evaluate_policy(policy, data, progress)

    done = [done for done, _ in progress.seen]
    assert done == sorted(done)
    assert len({total for _, total in progress.seen}) == 1
    assert progress.seen[-1][0] == progress.seen[-1][1]


def test_a_report_is_read_as_it_was_written(report: Report, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(encode_report(report))

    assert read_report(tmp_path / "report.json") == report
