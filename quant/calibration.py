"""Text for calibration and for measuring: the bundled one or a file of the user's, cut into windows of token ids.

Turning a row into ids is the caller's: it knows the tokenizer and the chat format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor

from quant.errors import QuantizationError

BUNDLED_CALIBRATION = "calibration.jsonl"
BUNDLED_HELD_OUT = "held_out.jsonl"


Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """Either a conversation or a text; the other one is empty."""

    text: str = ""
    messages: tuple[Message, ...] = ()


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
        content = path.read_text(encoding="utf-8")
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


def encode_rows(rows: Sequence[Row], encode: Encoder, seed: int | None = None) -> Tensor:
    """All rows as one run of ids (tokens,), in an order drawn from `seed`, or as they come if it is None."""
    order = list(range(len(rows)))
    if seed is not None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    ids = [token for index in order for token in encode(rows[index])]
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
        possible = max(found * 2 // seq_len, 0)
        raise QuantizationError(
            f"the calibration text has {found:,} tokens; {samples} samples of {seq_len} need at least {needed:,}: "
            f"give more text, or at most --samples {possible}"
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


def _parse_json_lines(content: str, origin: str) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            rows.append(_parse_row(line, f"{origin}, line {number}"))
    return rows


def _parse_row(line: str, origin: str) -> Row:
    try:
        record: object = json.loads(line)
    except json.JSONDecodeError as error:
        raise QuantizationError(f"{origin}: not valid JSON: {error.msg}") from error
    expected = 'expected {"messages": [{"role", "content"}, ...]} or {"text": "..."}'
    if not isinstance(record, dict):
        raise QuantizationError(f"{origin}: {expected}")
    fields = cast("dict[str, object]", record)
    text, messages = fields.get("text"), fields.get("messages")
    if isinstance(text, str):
        return Row(text=text)
    if not isinstance(messages, list) or not messages:
        raise QuantizationError(f"{origin}: {expected}")
    return Row(
        messages=tuple(_parse_message(message, f"{origin}: {expected}") for message in cast("list[object]", messages))
    )


def _parse_message(message: object, complaint: str) -> Message:
    if not isinstance(message, dict):
        raise QuantizationError(complaint)
    fields = cast("dict[str, object]", message)
    role, content = fields.get("role"), fields.get("content")
    if role not in ROLES or not isinstance(content, str):
        raise QuantizationError(f"{complaint}, roles {', '.join(ROLES)}")
    return Message(role, content)
