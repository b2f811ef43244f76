"""Prompts to sample answers to: read, rendered once by the chat format, over-long ones left out and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quant.model_directory import DataFile
from serving.model.chat_format import ChatFormat
from training.data.load import LoadPolicy, load_prompts
from training.data.records import Prompt
from training.errors import DataError, TrainingError
from training.loop import rows_of_step
from training.trunk import Trunk


@dataclass(frozen=True, slots=True)
class PromptSet:
    """prompts and ids stand at the same places. ids: up to where the answer begins."""

    prompts: tuple[Prompt, ...]
    ids: tuple[tuple[int, ...], ...]
    files: tuple[DataFile, ...]
    num_too_long: int

    def rows_of(self, iteration: int, count: int, seed: int) -> list[int]:
        """Which prompts iteration `iteration` answers: epochs in random order without a gap."""
        return rows_of_step(iteration, num_rows=len(self.ids), batch_size=count, seed=seed)


def require_chat_format(trunk: Trunk) -> ChatFormat:
    if trunk.chat_format is None:
        raise TrainingError(f"{trunk.source} has no chat format; start from a model that `train sft` wrote")
    return trunk.chat_format


def read_prompts(
    files: Sequence[Path],
    policy: LoadPolicy,
    chat_format: ChatFormat,
    *,
    max_tokens: int,
    max_prompts: int | None = None,
) -> PromptSet:
    """Raises DataError at the first broken line, and if no prompt is short enough."""
    loaded = load_prompts(files, policy)
    rendered = [(prompt, tuple(chat_format.render(prompt.messages))) for prompt in loaded.rows[:max_prompts]]
    kept = [(prompt, ids) for prompt, ids in rendered if len(ids) <= max_tokens]
    if not kept:
        raise DataError(
            f"each of the {len(rendered):,} prompts has more than {max_tokens} tokens; raise --max-prompt-tokens"
        )
    return PromptSet(
        tuple(prompt for prompt, _ in kept),
        tuple(ids for _, ids in kept),
        loaded.files,
        len(rendered) - len(kept),
    )
