"""What models are asked: the prompt sets of an evaluation, read from a data directory and thinned to a size.

The directory has `eval/`, `moderation/`, `prompts/` and `sft/`; files end in .jsonl, .jsonl.gz or .jsonl.zst.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from quant.model_directory import DataFile, JsonValue
from serving.model.chat_format import ChatMessage
from training.data.files import ROW_SUFFIXES, open_lines
from training.errors import DataError, TrainingError
from training.evaluate.ifeval.accuracy import Instruction

__all__ = ["Question", "QuestionSet", "find_data", "read_labelled", "read_questions", "thin"]

Item = TypeVar("Item")
_Line = TypeVar("_Line", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class Question:
    """messages: the conversation to answer, a user's turn last. follow_ups: user turns asked after each answer."""

    id: str
    messages: tuple[ChatMessage, ...]
    follow_ups: tuple[str, ...] = ()
    category: str = ""
    reference: str | None = None
    instructions: tuple[Instruction, ...] = ()


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """Questions of one name, their files, and how many rows the files hold."""

    name: str
    questions: tuple[Question, ...]
    files: tuple[DataFile, ...]
    num_rows: int


class _Message(msgspec.Struct):
    role: str
    content: str


class _QuestionLine(msgspec.Struct):
    prompt: list[_Message]
    id: int | str | None = None
    category: str = ""
    turns: list[str] = []
    reference: str | list[str] | None = None
    instruction_id_list: list[str] = []
    kwargs: list[dict[str, str | int | float | bool | list[str] | None]] = []


class _LabelledLine(msgspec.Struct):
    text: str
    label: int
    category: str = ""


def find_data(data: Path | None, name: str) -> Path:
    """The file `name` (without suffix) below the data directory. Raises TrainingError that names the setting."""
    if data is None:
        raise TrainingError(
            f"no evaluation data for {name}: name the directory with --data or CAUSERIE_DATA, "
            "or choose --measures that need none"
        )
    for suffix in (*ROW_SUFFIXES, ".txt", ".txt.gz"):
        path = data / f"{name}{suffix}"
        if path.is_file():
            return path
    raise TrainingError(
        f"{data} has no {name}.jsonl (or .gz, .zst); --data names the directory with eval/, moderation/, prompts/ "
        "and sft/; or choose --measures that do not need it"
    )


def read_questions(path: Path, name: str, limit: int | None) -> QuestionSet:
    """Questions of an `eval/` or `prompts/` file. Raises DataError with the line's number."""
    lines, file = _read(path, _QuestionLine)
    questions = [_question(line, index, path) for index, line in enumerate(lines)]
    return QuestionSet(name, tuple(thin(questions, limit)), (file,), len(lines))


def read_labelled(paths: Sequence[Path], name: str, label: int, limit: int | None) -> QuestionSet:
    """The texts of moderation files that have this label, as questions. Raises DataError with the line's number."""
    questions: list[Question] = []
    files: list[DataFile] = []
    for path in paths:
        lines, file = _read(path, _LabelledLine)
        files.append(file)
        questions += [
            Question(f"{path.name.partition('.')[0]}/{index}", (ChatMessage("user", line.text),), (), line.category)
            for index, line in enumerate(lines)
            if line.label == label
        ]
    if not questions:
        raise DataError(f"{', '.join(path.name for path in paths)}: no row has label {label}")
    return QuestionSet(name, tuple(thin(questions, limit)), tuple(files), len(questions))


def thin(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` items, evenly spaced, so that sets sorted by category keep all of them; no draw, no seed."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


def _question(line: _QuestionLine, index: int, path: Path) -> Question:
    if len(line.instruction_id_list) != len(line.kwargs):
        raise DataError(
            f"{path} line {index + 1}: {len(line.instruction_id_list)} instructions and {len(line.kwargs)} kwargs; "
            "expected as many"
        )
    reference = line.reference[0] if isinstance(line.reference, list) and line.reference else line.reference
    return Question(
        id=str(index if line.id is None else line.id),
        messages=tuple(_message(message, index, path) for message in line.prompt),
        follow_ups=tuple(line.turns[1:]),
        category=line.category,
        reference=reference if isinstance(reference, str) else None,
        instructions=tuple(
            Instruction(name, _without_none(kwargs))
            for name, kwargs in zip(line.instruction_id_list, line.kwargs, strict=True)
        ),
    )


def _message(message: _Message, index: int, path: Path) -> ChatMessage:
    match message.role:
        case "system" | "user" | "assistant":
            return ChatMessage(message.role, message.content)
        case other:
            raise DataError(f"{path} line {index + 1}: role is {other!r}; expected system, user or assistant")


def _without_none(kwargs: dict[str, str | int | float | bool | list[str] | None]) -> dict[str, JsonValue]:
    return {name: value for name, value in kwargs.items() if value is not None}


def _read(path: Path, kind: type[_Line]) -> tuple[list[_Line], DataFile]:
    decoder = msgspec.json.Decoder(kind)
    rows: list[_Line] = []
    with open_lines(path) as lines:
        for number, line in lines:
            try:
                rows.append(decoder.decode(line))
            except msgspec.MsgspecError as error:
                raise DataError(f"{path} line {number}: {error}") from error
        sha256 = lines.sha256()
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows, DataFile(path.name, sha256, len(rows))
