"""Each of IFEval's checkers on an answer that follows it and on answers that do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest

from training.errors import DataError
from training.evaluate.ifeval.instructions import CHECKERS, Arguments, follows

pytestmark = pytest.mark.unit

EXCERPT = Path(__file__).parents[3] / "data" / "eval" / "ifeval.jsonl"
GERMAN = "Das ist ein Satz auf Deutsch, und er ist nicht sehr lang, aber er reicht für den Test."

# instruction, arguments, an answer that follows it, answers that do not
CASES: list[tuple[str, Arguments, str, list[str]]] = [
    ("keywords:existence", {"keywords": ["mom", "mother"]}, "My MOM is a mother.", ["My mom is here."]),
    (
        "keywords:frequency",
        {"keyword": "fake", "frequency": 2, "relation": "at least"},
        "Fake news is fake.",
        ["One fake."],
    ),
    (
        "keywords:frequency",
        {"keyword": "fake", "frequency": 2, "relation": "less than"},
        "One fake.",
        ["Fake news is fake."],
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "A catalogue.", ["A Cat!", "the cat"]),
    (
        "keywords:letter_frequency",
        {"letter": "q", "let_frequency": 3, "let_relation": "at least"},
        "Queen, quick, quiet",
        ["Queen, quick"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "!", "let_frequency": 2, "let_relation": "less than"},
        "Well!",
        ["Well! Yes!", "!!!"],
    ),
    ("language:response_language", {"language": "de"}, GERMAN, ["This is an English sentence, and it is not German."]),
    (
        "language:response_language",
        {"language": "kn"},
        "ಇದು ಕನ್ನಡ ಭಾಷೆಯ ವಾಕ್ಯ",
        ["This is not Kannada at all.", "இது தமிழ் மொழியில் ஒரு வாக்கியம்"],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        "One.\n\n***\n\nTwo.",
        ["One.", "One.\n***\nTwo.\n***\nThree.", "One.\n***\n***\nTwo."],
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One.\n***\nTwo.\n***", ["***\nOne.\n***"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two three", ["one two"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "one two", ["one two three"]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        "One. Two! Three?",
        ["Dr. Smith came at 5.30. He left."],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        "Dr. Smith came at 5.30. He left",
        ["One. Two! Three?", "一。二！三？"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        'Hello there.\n\n"Weekend, at last."',
        ["Hello there.\n\nThe weekend.", "Weekend.\n\nHello.", "A.\n\nWeekend.\n\nB.", "Weekend."],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name], [address]", ["[name]", "(a), (b)"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. more", ["Bye.", "PS more"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP. P. S more", ["Bye.\nP.S. more"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        "List:\n* one\n- two",
        ["* one", "* one\n* two\n* three", "**one**\n**two**", "1. one\n2. two"],
    ),
    ("detectable_format:constrained_response", {}, "I think: My answer is no.", ["No.", "My answer is perhaps."]),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*one* and **two**",
        ["*one*", "** **, * *", "*one\ntwo*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        ["SECTION 1\na", "Section 1\na\nSection 2\nb", "SECTION A, SECTION B"],
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": [1, 2]}\n```', ['{"a": }', "Here: {}"]),
    ("detectable_format:title", {}, "<<A title>>\nText", ["<A title>", "<< >>", "A title"]),
    (
        "combination:two_responses",
        {},
        "First.\n******\nSecond.",
        ["First.", "Same.\n******\nSame.", "A\n******\nB\n******\nC", "A\n******\n******\nB"],
    ),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hello."}, "say hello. Hello!", ["Hello! Say hello."]),
    ("startend:end_checker", {"end_phrase": "Peace!"}, 'He said "peace!"', ["Peace! And so on."]),
    ("startend:quotation", {}, ' "quoted" ', ['"half', "none", '"']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "THIS is WELL-KNOWN.",
        ["THIS is it.", "1984 2024"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "THIS is it.",
        ["THIS IS it."],
    ),
    ("change_case:english_capital", {}, "ALL OF THIS IS IN CAPITALS!", ["Not all OF IT", GERMAN.upper()]),
    ("change_case:english_lowercase", {}, "all of this is in small letters.", ["Not all", GERMAN.lower()]),
    ("punctuation:no_comma", {}, "No comma; not one.", ["Well, one."]),
]


@pytest.mark.parametrize(("instruction", "arguments", "good", "bad"), CASES)
def test_a_checker_accepts_what_follows_and_refuses_what_does_not(
    instruction: str, arguments: Arguments, good: str, bad: list[str]
) -> None:
    assert follows(instruction, good, arguments)
    for answer in bad:
        assert not follows(instruction, answer, arguments), answer


def test_all_25_instructions_are_tested_both_ways() -> None:
    assert len(CHECKERS) == 25
    assert {instruction for instruction, *_ in CASES} == set(CHECKERS)


@pytest.mark.parametrize(("instruction", "arguments"), [(case[0], case[1]) for case in CASES])
def test_a_blank_answer_follows_nothing(instruction: str, arguments: Arguments) -> None:
    assert not follows(instruction, " \n", arguments)


def test_the_published_rows_name_known_instructions_with_usable_arguments() -> None:
    seen: set[str] = set()
    for line in EXCERPT.read_text(encoding="utf-8").splitlines():
        row = cast("dict[str, list[object]]", json.loads(line))
        for name, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            assert isinstance(name, str)
            follows(name, "An answer.", cast("Arguments", arguments))
            seen.add(name)
    assert seen == set(CHECKERS)


def test_what_is_no_instruction_or_no_argument_is_refused() -> None:
    with pytest.raises(DataError, match="'keywords:none' is none of IFEval's"):
        follows("keywords:none", "text", {})
    with pytest.raises(DataError, match="'num_words' must be a whole number; found 'many'"):
        follows("length_constraints:number_words", "text", {"num_words": "many", "relation": "at least"})
    with pytest.raises(DataError, match="relation is 'around'"):
        follows("length_constraints:number_words", "text", {"num_words": 3, "relation": "around"})
