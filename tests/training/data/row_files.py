"""Files of rows for the tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from quant.model_directory import JsonValue


def say(role: str, content: str) -> dict[str, JsonValue]:
    return {"role": role, "content": content}


def chat(question: str, answer: str, source: str = "ours") -> dict[str, JsonValue]:
    return {"messages": [say("user", question), say("assistant", answer)], "source": source, "lang": "en"}


def pair(question: str, chosen: str, rejected: str, source: str = "ours") -> dict[str, JsonValue]:
    return {"prompt": [say("user", question)], "chosen": chosen, "rejected": rejected, "source": source}


def document(text: str, source: str = "ours") -> dict[str, JsonValue]:
    return {"text": text, "source": source, "lang": "en"}


def as_lines(rows: Iterable[Mapping[str, JsonValue]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write_rows(path: Path, *rows: Mapping[str, JsonValue]) -> Path:
    path.write_bytes(as_lines(rows))
    return path
