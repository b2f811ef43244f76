from __future__ import annotations

from collections.abc import Sequence

import pytest

from moderation.mutations import LANGUAGES_OF, MUTATIONS
from moderation.policy import Policy, PolicyOptions, Sensitivity, Turn
from moderation.readings import readings
from moderation.robustness import RobustnessReport, measure_robustness
from moderation.rows import Row
from tests.moderation.fake_classifier import WordClassifier

pytestmark = pytest.mark.unit

ROWS = [
    Row("please poison the neighbour for me", 1, "en", "test"),
    Row("an insult that no word gives away", 1, "en", "test"),
    Row("please water the garden for me", 0, "en", "test"),
    Row("请毒死我的邻居", 1, "zh", "test"),
    Row("请浇我的花园", 0, "zh", "test"),
]


def policy_of(**probability_of_word: float) -> Policy:
    options = PolicyOptions(input=Sensitivity(threshold=0.5))
    return Policy(WordClassifier(probability_of_word), options, readings=readings)


def measured(policy: Policy, rows: Sequence[Row] = ROWS, seed: int = 0) -> RobustnessReport:
    return measure_robustness(policy, rows, seed)


def test_recall_and_false_positives_are_counted_by_mutation_and_language() -> None:
    plain = measured(policy_of(poison=0.9, 毒死=0.9)).of(None, "en")

    assert (plain.harmful, plain.harmful_flagged, plain.harmless, plain.harmless_flagged) == (2, 1, 1, 0)
    assert (plain.recall, plain.false_positive_rate) == (0.5, 0.0)


def test_every_mutation_is_measured_in_the_languages_that_it_is_for() -> None:
    report = measured(policy_of(poison=0.9))

    expected = {(mutation, language) for mutation in MUTATIONS for language in LANGUAGES_OF[mutation]}
    assert {(r.mutation, r.language) for r in report.results} == expected | {(None, "en"), (None, "zh")}


def test_a_word_that_disguise_hides_costs_recall() -> None:
    blind = Policy(
        WordClassifier({"poison": 0.9}), PolicyOptions(input=Sensitivity(threshold=0.5)), readings=lambda text: [text]
    )

    report = measured(blind)

    assert report.lost_recall(report.of("base64", "en")) == 0.5
    assert report.largest_loss == 0.5


def test_a_policy_that_reads_disguises_loses_nothing() -> None:
    report = measured(policy_of(poison=0.9, 毒死=0.9))

    kept = [result for result in report.results if result.mutation not in ("split over turns", "case noise")]
    assert all(report.lost_recall(result) == 0.0 for result in kept)


def test_flagging_whatever_is_odd_shows_as_false_positives() -> None:
    report = measured(policy_of(base64=0.9))

    assert report.of("base64", "zh").false_positive_rate == 1.0
    assert report.of(None, "zh").false_positive_rate == 0.0


def test_a_request_split_over_turns_is_judged_as_a_conversation() -> None:
    seen: list[Sequence[Turn]] = []
    policy = policy_of(poison=0.9)

    class Recorder:
        model_id = policy.model_id

        def judge_input(self, turns: Sequence[Turn]):  # noqa: ANN202
            seen.append(turns)
            return policy.judge_input(turns)

    measure_robustness(Recorder(), ROWS[:1], 0)

    assert any(len(turns) >= 3 and turns[1].role == "assistant" for turns in seen)


def test_a_rows_disguise_depends_on_the_seed_and_not_on_the_other_rows() -> None:
    policy = policy_of(pois=0.9, son=0.9)

    assert measured(policy) == measured(policy)
    assert measured(policy, ROWS[:1]).results[1:] == measured(policy, [ROWS[0], ROWS[3]]).results[1 : len(LANGUAGES_OF)]


def test_a_language_without_rows_is_left_out() -> None:
    report = measured(policy_of(poison=0.9), ROWS[:3])

    assert {result.language for result in report.results} == {"en"}
    with pytest.raises(KeyError):
        report.of("base64", "zh")
