"""A checker for each of IFEval's 25 instructions: pure functions of an answer and the instruction's arguments.

Source: arXiv:2311.07911, table 1 and appendix. Deviations: language by script and common words (`languages`), sentences
and capital words by our own splitter (`text_units`); keywords are plain text, never regular expressions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

from quant.model_directory import JsonValue
from training.errors import DataError
from training.evaluate.ifeval.languages import could_be
from training.evaluate.ifeval.text_units import capital_words, count_sentences, count_words, starred_paragraphs

__all__ = ["CHECKERS", "Arguments", "follows"]

Arguments: TypeAlias = Mapping[str, JsonValue]
Checker: TypeAlias = Callable[[str, Arguments], bool]

_FIXED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_RESPONSE_DIVIDER = "******"
_FENCES = ("```json", "```Json", "```JSON", "```")


def follows(instruction: str, answer: str, arguments: Arguments) -> bool:
    """True if `answer` does what the instruction asks; a blank answer never does. Raises DataError."""
    checker = CHECKERS.get(instruction)
    if checker is None:
        raise DataError(f"instruction {instruction!r} is none of IFEval's: {', '.join(sorted(CHECKERS))}")
    return bool(answer.strip()) and checker(answer, arguments)


def has_keywords(answer: str, arguments: Arguments) -> bool:
    return all(keyword.lower() in answer.lower() for keyword in _texts(arguments, "keywords"))


def has_keyword_often(answer: str, arguments: Arguments) -> bool:
    count = answer.lower().count(_text(arguments, "keyword").lower())
    return _compare(count, _text(arguments, "relation"), _number(arguments, "frequency"))


def avoids_words(answer: str, arguments: Arguments) -> bool:
    """Whole words only: "cat" does not forbid "catalogue"."""
    words = _texts(arguments, "forbidden_words")
    return not any(re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE) for word in words)


def has_letter_often(answer: str, arguments: Arguments) -> bool:
    count = answer.lower().count(_text(arguments, "letter").lower())
    return _compare(count, _text(arguments, "let_relation"), _number(arguments, "let_frequency"))


def is_in_language(answer: str, arguments: Arguments) -> bool:
    return could_be(answer, _text(arguments, "language"))


def has_paragraphs(answer: str, arguments: Arguments) -> bool:
    """Exactly as many as asked, divided by ***."""
    paragraphs = starred_paragraphs(answer)
    return paragraphs is not None and len(paragraphs) == _number(arguments, "num_paragraphs")


def has_words(answer: str, arguments: Arguments) -> bool:
    return _compare(count_words(answer), _text(arguments, "relation"), _number(arguments, "num_words"))


def has_sentences(answer: str, arguments: Arguments) -> bool:
    return _compare(count_sentences(answer), _text(arguments, "relation"), _number(arguments, "num_sentences"))


def nth_paragraph_begins_with(answer: str, arguments: Arguments) -> bool:
    """Paragraphs are divided by a blank line here; the first word is compared without quotes and punctuation."""
    paragraphs = answer.split("\n\n")
    nth = _number(arguments, "nth_paragraph")
    count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if count != _number(arguments, "num_paragraphs") or nth > count or not paragraphs[nth - 1].strip():
        return False
    first = paragraphs[nth - 1].split()[0].lstrip("'\"")
    return re.split(r"[.,?!'\"]", first)[0].lower() == _text(arguments, "first_word").lower()


def has_placeholders(answer: str, arguments: Arguments) -> bool:
    """Square brackets such as [address]."""
    return len(re.findall(r"\[.*?\]", answer)) >= _number(arguments, "num_placeholders")


def has_postscript(answer: str, arguments: Arguments) -> bool:
    """P.S. or P.P.S, in any case, with or without spaces after the full stops."""
    marker = _text(arguments, "postscript_marker").lower()
    pattern = r"\.\s?".join(re.escape(letter) for letter in marker if letter.isalnum())
    end = r"\." if marker.endswith(".") else r"(?!\w)"
    return re.search(rf"(?<!\w){pattern}{end}", answer.lower()) is not None


def has_bullets(answer: str, arguments: Arguments) -> bool:
    """Exactly as many lines as asked that begin with * or -; a line that begins with ** is bold text, not a bullet."""
    bullets = re.findall(r"^[^\S\n]*(?:\*[^*\n]|-)", answer, re.MULTILINE)
    return len(bullets) == _number(arguments, "num_bullets")


def gives_fixed_answer(answer: str, arguments: Arguments) -> bool:
    return any(allowed in answer for allowed in _FIXED_ANSWERS)


def has_highlights(answer: str, arguments: Arguments) -> bool:
    """*so* or **so**, with something inside."""
    single = re.findall(r"\*[^\n*]*\*", answer)
    double = re.findall(r"\*\*[^\n*]*\*\*", answer)
    count = sum(bool(part.strip("*").strip()) for part in [*single, *double])
    return count >= _number(arguments, "num_highlights")


def has_sections(answer: str, arguments: Arguments) -> bool:
    splitter = re.escape(_text(arguments, "section_spliter"))
    return len(re.findall(rf"{splitter}\s?\d+", answer)) >= _number(arguments, "num_sections")


def is_json(answer: str, arguments: Arguments) -> bool:
    """The whole answer, which may stand in a Markdown fence."""
    content = answer.strip()
    for fence in _FENCES:
        content = content.removeprefix(fence)
    try:
        json.loads(content.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def has_title(answer: str, arguments: Arguments) -> bool:
    return any(title.strip("<>").strip() for title in re.findall(r"<<[^\n]+>>", answer))


def gives_two_responses(answer: str, arguments: Arguments) -> bool:
    """Two different ones, divided by ******."""
    parts = answer.split(_RESPONSE_DIVIDER)
    if any(not part.strip() for part in parts[1:-1]):
        return False
    responses = [part.strip() for part in parts if part.strip()]
    return len(responses) == 2 and responses[0] != responses[1]


def repeats_prompt(answer: str, arguments: Arguments) -> bool:
    return answer.strip().lower().startswith(_text(arguments, "prompt_to_repeat").strip().lower())


def ends_with(answer: str, arguments: Arguments) -> bool:
    """The last words, a closing quotation mark left aside."""
    return answer.strip().strip('"').lower().endswith(_text(arguments, "end_phrase").strip().lower())


def has_capital_words(answer: str, arguments: Arguments) -> bool:
    count = len(capital_words(answer))
    return _compare(count, _text(arguments, "capital_relation"), _number(arguments, "capital_frequency"))


def is_all_capitals(answer: str, arguments: Arguments) -> bool:
    return answer.isupper() and could_be(answer, "en")


def is_all_lowercase(answer: str, arguments: Arguments) -> bool:
    return answer.islower() and could_be(answer, "en")


def has_no_comma(answer: str, arguments: Arguments) -> bool:
    return "," not in answer


def is_quoted(answer: str, arguments: Arguments) -> bool:
    content = answer.strip()
    return len(content) > 1 and content[0] == '"' and content[-1] == '"'


CHECKERS: Mapping[str, Checker] = {
    "keywords:existence": has_keywords,
    "keywords:frequency": has_keyword_often,
    "keywords:forbidden_words": avoids_words,
    "keywords:letter_frequency": has_letter_often,
    "language:response_language": is_in_language,
    "length_constraints:number_paragraphs": has_paragraphs,
    "length_constraints:number_words": has_words,
    "length_constraints:number_sentences": has_sentences,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_begins_with,
    "detectable_content:number_placeholders": has_placeholders,
    "detectable_content:postscript": has_postscript,
    "detectable_format:number_bullet_lists": has_bullets,
    "detectable_format:constrained_response": gives_fixed_answer,
    "detectable_format:number_highlighted_sections": has_highlights,
    "detectable_format:multiple_sections": has_sections,
    "detectable_format:json_format": is_json,
    "detectable_format:title": has_title,
    "combination:two_responses": gives_two_responses,
    "combination:repeat_prompt": repeats_prompt,
    "startend:end_checker": ends_with,
    "startend:quotation": is_quoted,
    "change_case:capital_word_frequency": has_capital_words,
    "change_case:english_capital": is_all_capitals,
    "change_case:english_lowercase": is_all_lowercase,
    "punctuation:no_comma": has_no_comma,
}


def _compare(count: int, relation: str, limit: int) -> bool:
    if relation not in ("at least", "less than"):
        raise DataError(f"relation is {relation!r}; expected 'at least' or 'less than'")
    return count >= limit if relation == "at least" else count < limit


def _text(arguments: Arguments, name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str):
        raise DataError(f"instruction argument {name!r} must be text; found {value!r}")
    return value


def _number(arguments: Arguments, name: str) -> int:
    value = arguments.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or value != int(value):
        raise DataError(f"instruction argument {name!r} must be a whole number; found {value!r}")
    return int(value)


def _texts(arguments: Arguments, name: str) -> list[str]:
    value = arguments.get(name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise DataError(f"instruction argument {name!r} must be a list of texts; found {value!r}")
    return [str(item) for item in value]
