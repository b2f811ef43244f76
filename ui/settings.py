"""The folded-away settings, as the components hold them and as the browser keeps them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

from ui.client import Sampling

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """In the order of the components. Temperature and top-p count only if `is_custom`: else the model's own hold."""

    system_prompt: str = ""
    max_tokens: int = 1024
    is_custom: bool = False
    temperature: float = 0.7
    top_p: float = 0.9
    seed: str = ""

    @classmethod
    def from_values(cls, values: Sequence[Any]) -> Settings:
        """Raises ValueError or TypeError when they are not settings at all."""
        system_prompt, max_tokens, is_custom, temperature, top_p, seed = values
        settings = cls(
            system_prompt=str(system_prompt or ""),
            max_tokens=int(max_tokens),
            is_custom=bool(is_custom),
            temperature=float(temperature),
            top_p=float(top_p),
            seed=str(seed or "").strip(),
        )
        if not (math.isfinite(settings.temperature) and math.isfinite(settings.top_p)):
            raise ValueError("Temperature and top-p must be numbers.")
        return settings

    @classmethod
    def from_json(cls, stored: object) -> Settings:
        """The defaults for what a browser could not have stored."""
        try:
            return cls.from_values(cast("list[Any]", stored) if isinstance(stored, list) else [])
        except (TypeError, ValueError):
            return cls()

    def as_list(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]

    def sampling(self) -> Sampling:
        """Raises ValueError with a sentence for the user."""
        if self.seed and not (self.seed.isascii() and self.seed.lstrip("-").isdigit()):
            raise ValueError("The seed must be a whole number, or empty for a random one.")
        return Sampling(
            temperature=self.temperature if self.is_custom else None,
            top_p=self.top_p if self.is_custom else None,
            max_tokens=self.max_tokens,
            seed=int(self.seed) if self.seed else None,
        )
