"""Which of a prompt's instructions an answer follows, strictly and loosely (arXiv:2311.07911, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from training.evaluate.ifeval.instructions import Arguments, follows

__all__ = ["Checked", "Instruction", "check_answer", "loose_variants"]


@dataclass(frozen=True, slots=True)
class Instruction:
    name: str
    arguments: Arguments


@dataclass(frozen=True, slots=True)
class Checked:
    """Which instructions of one prompt were followed, in their order."""

    instructions: tuple[Instruction, ...]
    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


def check_answer(answer: str, instructions: Sequence[Instruction]) -> Checked:
    variants = loose_variants(answer)
    return Checked(
        tuple(instructions),
        tuple(follows(one.name, answer, one.arguments) for one in instructions),
        tuple(any(follows(one.name, text, one.arguments) for text in variants) for one in instructions),
    )


def loose_variants(answer: str) -> list[str]:
    """The answer, without its first line ("Sure, here it is:"), its last, both, and each without asterisks."""
    lines = answer.split("\n")
    cuts = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [text.replace("*", "") if without else text for without in (False, True) for text in cuts]
