"""Text for calibration and for measuring: the bundled one or a file of the user's, cut into windows of token ids.

What a file may hold is checked here, line by line; whether it holds what the result is measured on is checked too.
Turning a row into ids is the caller's: it knows the tokenizer and the chat format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor

from quant.errors import QuantizationError

BUNDLED_CALIBRATION = "calibration.jsonl"
BUNDLED_HELD_OUT = "held_out.jsonl"
# A line longer than a long book is a mistake, such as a missing line break, and would be read into memory as it is.
MAX_LINE_CHARACTERS = 2_000_000
# Twenty words in a row that two texts share are a copy, not a common phrase.
OVERLAP_WORDS = 20
# Scripts that put no spaces between words: each character counts as one.
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+")
_EXPECTED = 'expected {"messages": [{"role", "content"}, ...]} or {"text": "..."}'

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """Either a conversation or a text; the other one is empty. `line` of its file, from 1; 0 if it is no line."""

    text: str = ""
    messages: tuple[Message, ...] = ()
    line: int = field(default=0, compare=False)


Encoder: TypeAlias = Callable[[Row], Sequence[int]]


def bundled_rows(name: str) -> list[Row]:
    """Rows of one of the files that come with the package."""
    source = resources.files("quant").joinpath("data", name)
    return _parse_json_lines(source.read_text(encoding="utf-8"), f"quant/data/{name}")


def load_rows(path: Path) -> list[Row]:
    """Rows of a .jsonl file ({"messages": [{"role", "content"}, ...]} or {"text"} a line) or of a .txt file (one row).

    QuantizationError says which line is wrong and what was expected.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark in front
    except OSError as error:
        raise QuantizationError(f"calibration file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise QuantizationError(f"calibration file {path} is not UTF-8 text: {error}") from error
    if path.suffix == ".txt":
        rows = [Row(text=content)] if content.strip() else []
    elif path.suffix == ".jsonl":
        rows = _parse_json_lines(content, str(path))
    else:
        raise QuantizationError(f"calibration file {path} must end in .jsonl or .txt")
    if not rows:
        raise QuantizationError(f"calibration file {path} is empty")
    return rows


def encode_rows(
    rows: Sequence[Row], encode: Encoder, seed: int | None = None, *, enough_tokens: int | None = None
) -> Tensor:
    """The rows as one run of ids (tokens,), in an order drawn from `seed`, or as they come if it is None.

    enough_tokens: rows after so many are left out; None takes all
    """
    order = list(range(len(rows)))
    if seed is not None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    ids: list[int] = []
    for index in order:
        ids += encode(rows[index])
        if enough_tokens is not None and len(ids) >= enough_tokens:
            break
    return torch.tensor(ids, dtype=torch.int64)


def calibration_windows(ids: Tensor, samples: int, seq_len: int) -> Tensor:
    """(samples, seq_len) windows spread evenly over ids (tokens,), overlapping by up to half where the text is short.

    Raises QuantizationError, with the number that is needed, if they would overlap by more.
    """
    if samples < 1 or seq_len < 1:
        raise QuantizationError(f"samples and sequence length must be positive; found {samples} and {seq_len}")
    found = ids.shape[0]
    needed = max(seq_len, samples * seq_len // 2)
    if found < needed:
        less = f", or at most --samples {found * 2 // seq_len}" if found >= seq_len else ""
        raise QuantizationError(
            f"the calibration text has {found:,} tokens; {samples} samples of {seq_len} need at least {needed:,}: "
            f"give more text{less}"
        )
    last_start = found - seq_len
    starts = [0] if samples == 1 else [round(index * last_start / (samples - 1)) for index in range(samples)]
    return torch.stack([ids[start : start + seq_len] for start in starts])


def held_out_windows(ids: Tensor, seq_len: int, max_tokens: int) -> Tensor:
    """(windows, seq_len) consecutive windows, at most max_tokens in all. QuantizationError if not one is full."""
    count = min(ids.shape[0], max_tokens) // seq_len
    if count < 1:
        raise QuantizationError(f"the held-out text has {ids.shape[0]:,} tokens; one window takes {seq_len:,}")
    return ids[: count * seq_len].view(count, seq_len)


def refuse_overlap(calibration: Sequence[Row], held_out: Sequence[Row], origin: str, held_out_name: str) -> None:
    """Raises QuantizationError naming the first line of `calibration` that holds a passage of `held_out`.

    A passage is OVERLAP_WORDS words in a row, whatever their case and punctuation. A model that was calibrated on what
    it is measured on would look better than it is. origin: the file's name. held_out_name: of the text to measure on.
    """
    passages = {hash(passage) for row in held_out for passage in _passages(row)}
    for row in calibration:
        for passage in _passages(row):
            if hash(passage) in passages:
                place = f"{origin}, line {row.line}" if row.line else origin
                start = " ".join(passage[:8])
                raise QuantizationError(
                    f'{place} holds text of {held_out_name}, on which the result is measured: "{start} ..." '
                    f"({OVERLAP_WORDS} words in a row are the same); take it out of the calibration text"
                )


def _passages(row: Row) -> Iterator[tuple[str, ...]]:
    """Every run of OVERLAP_WORDS words. System prompts are left out: many conversations share one."""
    for text in (row.text, *(message.content for message in row.messages if message.role != "system")):
        words = _WORD.findall(text.casefold())
        for start in range(len(words) - OVERLAP_WORDS + 1):
            yield tuple(words[start : start + OVERLAP_WORDS])


def _parse_json_lines(content: str, origin: str) -> list[Row]:
    rows: list[Row] = []
    # Not `splitlines`: U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            rows.append(_parse_row(line, number, f"{origin}, line {number}"))
    return rows


def _parse_row(line: str, number: int, origin: str) -> Row:
    if len(line) > MAX_LINE_CHARACTERS:
        raise QuantizationError(
            f"{origin} has {len(line):,} characters; at most {MAX_LINE_CHARACTERS:,} are read: is a line break missing?"
        )
    fields = _parse_object(line, origin)
    text, messages = fields.get("text"), fields.get("messages")
    if text is not None and messages is not None:
        raise QuantizationError(f"{origin} has both text and messages; {_EXPECTED}")
    if isinstance(text, str):
        return Row(text=_checked_text(text, f"{origin}: its text"), line=number)
    if not isinstance(messages, list) or not messages:
        found = ", ".join(f"{key}: {type(value).__name__}" for key, value in list(fields.items())[:4]) or "no key"
        raise QuantizationError(f"{origin}: {_EXPECTED}; found {found}")
    listed = cast("list[object]", messages)
    return Row(
        messages=tuple(_parse_message(one, f"{origin}: message {place}") for place, one in enumerate(listed, start=1)),
        line=number,
    )


def _parse_object(line: str, origin: str) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        keys = [key for key, _ in pairs]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise QuantizationError(f"{origin}: the key {twice[0]!r} occurs twice in one object")
        return dict(pairs)

    try:
        record: object = json.loads(line, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise QuantizationError(f"{origin}: not valid JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise QuantizationError(f"{origin}: not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise QuantizationError(f"{origin}: {_EXPECTED}; found {type(record).__name__}")
    return cast("dict[str, object]", record)


def _parse_message(message: object, origin: str) -> Message:
    if not isinstance(message, dict):
        raise QuantizationError(f"{origin} is {type(message).__name__}; {_EXPECTED}")
    fields = cast("dict[str, object]", message)
    role, content = fields.get("role"), fields.get("content")
    if role not in ROLES:
        raise QuantizationError(f"{origin} has the role {role!r}; roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise QuantizationError(f"{origin}: content is {type(content).__name__}, expected a string")
    return Message(role, _checked_text(content, f"{origin}: its content"))


def _checked_text(text: str, what: str) -> str:
    if not text.strip():
        raise QuantizationError(f"{what} is empty; leave the line out")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x}"
        raise QuantizationError(f"{what} has half a surrogate pair ({found}), which is no character") from error
    return text
