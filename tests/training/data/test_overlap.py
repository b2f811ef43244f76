from __future__ import annotations

import random
from pathlib import Path

import pytest

from serving.model.chat_format import ChatMessage
from tests.training.data.row_files import chat, document, pair, say, write_rows
from training.data.overlap import RUN_WORDS, EvaluationTexts, read_evaluation, row_digest, text_key
from training.data.records import Conversation, Document, Prompt, Ranking
from training.errors import DataError

pytestmark = pytest.mark.unit


def question(text: str) -> tuple[ChatMessage, ...]:
    return (ChatMessage("user", text),)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is it?", "what  is it"),
        ("don't", "Don’t"),
        ("Ｗｈａｔ", "what"),
        ("你好，世界", "你好世界"),
        ("line\nbreak_here", "LINE break here."),
        ("2 + 2 = 4", "2+2=4"),
    ],
)
def test_key_forgets_case_width_spaces_and_punctuation(one: str, other: str) -> None:
    assert text_key(one) == text_key(other)


@pytest.mark.parametrize(
    ("one", "other"), [("3 + 4", "3 - 4"), ("2.5", "25"), ("1/2", "12"), ("?!", "..."), ("café", "cafe")]
)
def test_key_keeps_what_makes_a_difference(one: str, other: str) -> None:
    assert text_key(one) != text_key(other)


def test_digest_is_of_question_and_answers_with_their_borders() -> None:
    assert row_digest(Ranking(question("a"), ("b", "c"), (1, 2), "x")) == row_digest(
        Ranking(question("A!"), ("B.", "c"), (1, 2), "y")
    )
    assert row_digest(Ranking(question("a"), ("b", "c"), (1, 2), "x")) != row_digest(
        Ranking(question("a"), ("bc", "d"), (1, 2), "x")
    )
    assert row_digest(Ranking(question("a"), ("b", "c"), (1, 2), "")) != row_digest(
        Ranking(question("a"), ("c", "b"), (1, 2), "")
    )


@pytest.fixture
def evaluation(tmp_path: Path) -> EvaluationTexts:
    prompts = {"id": 1, "prompt": [say("user", "Name a colour.")], "reference": None}
    files = [
        write_rows(tmp_path / "prompts.jsonl", prompts),
        write_rows(tmp_path / "chats.jsonl", chat("Who wrote Emma?", "Jane Austen")),
        write_rows(tmp_path / "pairs.jsonl", pair("How far is the moon?", "Far", "Near")),
    ]
    return read_evaluation(files, with_runs=False)


@pytest.mark.parametrize("text", ["name a colour", "Who wrote “Emma”?", "How far is the moon?"])
def test_row_overlaps_by_its_first_user_turn(evaluation: EvaluationTexts, text: str) -> None:
    more = (*question(text), ChatMessage("assistant", "Yes"), ChatMessage("user", "And then?"))
    assert evaluation.overlap(Prompt(question(text), "", ""))
    assert evaluation.overlap(Prompt((ChatMessage("system", "Be brief."), *more), "", ""))
    assert evaluation.overlap(Conversation((*more, ChatMessage("assistant", "Nothing")), "", ""))
    assert evaluation.overlap(Ranking(question(text), ("a", "b"), (1, 2), ""))


def test_row_with_another_first_turn_does_not_overlap(evaluation: EvaluationTexts) -> None:
    later = (*question("Hello"), ChatMessage("assistant", "Hi"), ChatMessage("user", "Name a colour."))
    assert not evaluation.overlap(Prompt(later, "", ""))


def words(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefgh", k=5)) for _ in range(count)]


@pytest.mark.parametrize("start", range(9))
def test_document_overlaps_wherever_it_shares_a_long_run_of_words(tmp_path: Path, start: int) -> None:
    held_out = words(1, 200)
    path = tmp_path / "novel.txt"
    path.write_text(" ".join(held_out))
    evaluation = read_evaluation([path], with_runs=True)
    shared = held_out[50 + start : 50 + start + RUN_WORDS + 3]
    around = words(2, 40)
    text = ", ".join([*around[: 20 - start], *shared, *around[20:]])
    assert evaluation.overlap(Document(text.upper(), "", ""))


def test_document_that_shares_a_shorter_run_does_not_overlap(tmp_path: Path) -> None:
    held_out = words(1, 200)
    path = write_rows(tmp_path / "held_out.jsonl", document(" ".join(held_out)))
    evaluation = read_evaluation([path], with_runs=True)
    text = " ".join([*words(2, 20), *held_out[50 : 50 + RUN_WORDS - 1], *words(3, 20)])
    assert not evaluation.overlap(Document(text, "", ""))


def test_characters_of_chinese_are_its_words(tmp_path: Path) -> None:
    text = "天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往秋收冬藏"
    evaluation = read_evaluation([write_rows(tmp_path / "zh.jsonl", document(text))], with_runs=True)
    assert evaluation.overlap(Document("甲乙丙。" + text[3:20] + "。丁", "", ""))


def test_evaluation_row_without_text_is_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "prompts.jsonl", document("a"), {"question": "b"})
    with pytest.raises(DataError, match=r"prompts\.jsonl line 2: there is no"):
        read_evaluation([path], with_runs=False)
