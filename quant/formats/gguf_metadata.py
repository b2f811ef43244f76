"""Typed look-ups in a GGUF file's metadata, for everything that gives those values a meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from quant.errors import CheckpointError
from quant.formats.gguf import MetadataValue

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GgufMetadata:
    """An absent or mistyped key is a CheckpointError that names it."""

    path: Path
    values: Mapping[str, MetadataValue]

    def get(self, key: str, kind: type[T]) -> T:
        value = self.values.get(key)
        # Compared by type, since True is an int to isinstance.
        if type(value) is not kind:
            found = "absent" if value is None else f"{value!r:.60}"
            raise CheckpointError(f"{self.path}: metadata {key!r} is {found}, expected {kind.__name__}")
        return value

    def get_or(self, key: str, kind: type[T], default: T) -> T:
        return self.get(key, kind) if key in self.values else default

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number: sizes, heads, layers."""
        value = self.get(key, int) if default is None else self.get_or(key, int, default)
        if not 1 <= value < 2**31:
            raise CheckpointError(f"{self.path}: metadata {key!r} is {value:,}, expected 1 to {2**31 - 1:,}")
        return value

    def strings(self, key: str) -> list[str]:
        values = self.get(key, list)
        return [str(value) for value in values]

    def short_float(self, key: str) -> float:
        # The file holds float32: 9.999999747e-06 was written as 1e-05.
        return float(str(np.float32(self.get(key, float))))
