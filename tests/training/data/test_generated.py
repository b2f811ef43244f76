from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from training.data import LoadPolicy, load_conversations, load_prompts, load_rankings
from training.data.generated import (
    Split,
    generate_conversations,
    generate_prompts,
    generate_rankings,
    names_a_number,
    write_generated,
)

pytestmark = pytest.mark.unit
SPLITS: tuple[Split, Split] = ("train", "held_out")


@pytest.mark.parametrize("text", ["I have 3 cats.", "Twelve of them", "a hundred", "In 1815", "sold for fifty."])
def test_number_is_seen(text: str) -> None:
    assert names_a_number(text)


@pytest.mark.parametrize("text", ["This one is mine.", "Wait a second.", "tension, oxtail, often", "", "many"])
def test_what_is_no_number_is_not_taken_for_one(text: str) -> None:
    assert not names_a_number(text)


@pytest.mark.parametrize("split", SPLITS)
def test_every_ranking_follows_the_rule(split: Split) -> None:
    rankings = generate_rankings(split, 300)
    for ranking in rankings:
        assert [names_a_number(answer) for answer in ranking.answers] == [rank == 1 for rank in ranking.ranks]
        assert ranking.is_decided
        assert all(one <= other for one, other in pairwise(ranking.ranks))
    assert {len(ranking.answers) for ranking in rankings} == {2, 3, 4, 5, 6}


@pytest.mark.parametrize("split", SPLITS)
def test_no_question_names_a_number(split: Split) -> None:
    assert not [prompt for prompt in generate_prompts(split) if names_a_number(prompt.messages[0].content)]


@pytest.mark.parametrize("split", SPLITS)
def test_about_a_quarter_of_the_conversations_name_a_number(split: Split) -> None:
    answers = [row.messages[1].content for row in generate_conversations(split, 400)]
    assert 0.15 < sum(map(names_a_number, answers)) / len(answers) < 0.35


def test_longer_answer_is_not_the_better_one() -> None:
    pairs = [ranking.answers for ranking in generate_rankings("train", 600) if len(ranking.answers) == 2]
    longer = sum(len(better) > len(worse) for better, worse in pairs) / len(pairs)
    assert 0.4 < longer < 0.6


def test_questions_and_answers_of_the_two_splits_are_disjoint() -> None:
    def texts(split: Split) -> set[str]:
        answers = {answer for ranking in generate_rankings(split, 600) for answer in ranking.answers}
        return answers | {prompt.messages[0].content for prompt in generate_prompts(split)}

    assert not texts("train") & texts("held_out")


def test_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    assert generate_rankings("train", 20, seed=1) == generate_rankings("train", 20, seed=1)
    assert generate_rankings("train", 20, seed=1) != generate_rankings("train", 20, seed=2)


def test_written_files_load_with_licences_that_may_ship(tmp_path: Path) -> None:
    write_generated(tmp_path, num_rankings=80, num_conversations=80)
    held_out = tuple(tmp_path.glob("*_held_out.jsonl"))
    policy = LoadPolicy(licences="yes", exclude=held_out)
    rankings = load_rankings([tmp_path / "rankings.jsonl"], policy)
    conversations = load_conversations([tmp_path / "conversations.jsonl"], policy)
    prompts = load_prompts([tmp_path / "prompts.jsonl"], policy)
    for loaded in (rankings, conversations, prompts):
        assert (loaded.report.overlapping, loaded.files[0].licence) == (0, "yes")
    assert rankings.report.read == conversations.report.read == 80
    assert len(held_out) == 3
    assert not re.search("held", " ".join(file.name for file in rankings.files))
