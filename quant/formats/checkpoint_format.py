"""The versions of AutoGPTQ's layout. Apart from what reads and writes them, so that a flag's words need no torch."""

from __future__ import annotations

from enum import StrEnum


class CheckpointFormat(StrEnum):
    """By the names that files and other tools use. Every engine reads version 1; some do not know version 2."""

    V1 = "gptq"
    V2 = "gptq_v2"

    @property
    def number(self) -> int:
        return 1 if self is CheckpointFormat.V1 else 2
