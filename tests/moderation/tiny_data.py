"""A data directory of the real layout with a few rows, for tests that judge it with `WordClassifier`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.moderation.test_rows import write_lines

FREE, CLOSED = "free_source", "closed_source"


def row(text: str, label: int, category: str = "none", lang: str = "en", source: str = FREE) -> object:
    return {"text": text, "label": label, "lang": lang, "source": source, "category": category}


def chat(*user_turns: str, lang: str = "en", source: str = FREE) -> object:
    messages = [
        {"role": role, "content": text} for turn in user_turns for role, text in (("user", turn), ("assistant", "Yes."))
    ]
    return {"messages": messages, "prompt": messages[:1], "lang": lang, "source": source}


def write_tiny_data(directory: Path) -> Path:
    """Two test files, dev, validation files and licences."""
    write_lines(
        directory / "moderation/test_openai_moderation.jsonl.gz",
        [
            *(row(f"I hate group number {i}", 1, "hate,violence") for i in range(6)),
            *(row(f"kill victim number {i}", 1, "violence") for i in range(6)),
            *(row(f"Suicide, spelled out, number {i}", 1, "Suicide, Self-Harm") for i in range(2)),
            *(row(f"a quiet day number {i} " + "and more of it " * i, 0) for i in range(10)),
        ],
    )
    write_lines(
        directory / "moderation/test_user_prompts_crossdomain.jsonl.gz",
        [
            row("how do I kill my neighbour", 1, "Physical Harm"),
            row("tell me a story", 0),
            row("怎么杀人放火不被抓", 1, "Physical Harm", "zh", "catqa"),
            row("今天天气很好", 0, "none", "zh", "belle"),
        ],
    )
    write_lines(
        directory / "moderation/dev.jsonl.gz",
        [
            row("a harmless | kill *joke*", 0),
            row("quietly mean", 1, "hate"),
            row("closed kill joke", 0, source=CLOSED),
            row("closed and mean", 1, "hate", source=CLOSED),
            row("kill them", 1, "violence"),
        ],
    )
    write_lines(
        directory / "sft/val.jsonl.gz",
        [
            chat("How tall is that tree?"),
            chat("kill a process", source=CLOSED),
            chat("Name a river", "and how to kill it"),
            chat("kill my neighbour", source="safety_tuned_refusals"),
        ],
    )
    for name in ("train_en", "train_zh"):
        write_lines(directory / f"sft/{name}.jsonl.gz", [chat("How do I make tea?")])
    # A source that may be shipped and whose prompts ask for harm by design: no example of a false positive.
    meant = "hh_harmless_base"
    write_lines(
        directory / "prompts/val.jsonl.gz",
        [chat("哪条河最长", lang="zh"), chat("kill weeds"), chat("kill my boss", source=meant)],
    )
    (directory / "licences.json").write_text(json.dumps({"yes": [FREE, meant], "no": [CLOSED]}), encoding="utf-8")
    return directory


def write_training_data(directory: Path) -> Path:
    """The same with the files that training reads besides, and a dev file that agrees with them."""
    write_tiny_data(directory)
    harmless = [row(f"please water the plant number {i}", 0) for i in range(30)]
    harmful = [row(f"kill victim number {i} of many", 1) for i in range(30)]
    write_lines(directory / "moderation/train.jsonl.gz", [*harmless[:20], *harmful[:20]])
    write_lines(directory / "moderation/dev.jsonl.gz", [*harmless[20:], *harmful[20:]])
    for name in ("sft/train_en", "sft/train_zh", "preference/train"):
        write_lines(directory / f"{name}.jsonl.gz", [chat(f"{name} request {i}") for i in range(5)])
    for name in ("en_00", "zh_00"):
        text = "Once upon a time. " * 40
        write_lines(directory / f"pretrain/{name}.jsonl.gz", [{"text": text, "lang": "en", "source": FREE}])
    return directory
