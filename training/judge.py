"""The reward model as PPO asks it: a score for each sampled answer, by its ids where it reads those, else by text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from serving.model.chat_format import ChatMessage
from serving.model.tokenizer import ModelTokenizer
from training.batches import Batch
from training.data.records import Prompt
from training.experience import at_rows
from training.reward_model import RewardHead, RewardModel
from training.roles import Body
from training.rollout import Trajectory


class Judge(Protocol):
    def score(self, trajectory: Trajectory, prompts: Sequence[Prompt], micro_batches: Sequence[Tensor]) -> Tensor:
        """(rows,) float32, in deviations of the reward model from its mean.

        prompts: those of the data; `trajectory.prompt_index` points into them
        micro_batches: row indices of each forward pass
        """
        ...


@dataclass(frozen=True, slots=True)
class IdJudge:
    """A reward model with the policy's tokenizer and chat format: it reads the very ids that were sampled."""

    body: Body
    head: RewardHead

    def score(self, trajectory: Trajectory, prompts: Sequence[Prompt], micro_batches: Sequence[Tensor]) -> Tensor:
        return at_rows(trajectory, micro_batches, self._scores)

    def _scores(self, batch: Batch) -> Tensor:
        compute = self.body.compute
        batch = batch.to(compute.device)
        with compute.autocast():
            hidden = self.body.hidden(batch)
        last = batch.sample_ids.sum(1) - 1
        return self.head(hidden[torch.arange(hidden.shape[0], device=last.device), last])


@dataclass(frozen=True, slots=True)
class TextJudge:
    """A reward model with a tokenizer or chat format of its own: it reads the answer as text."""

    model: RewardModel
    tokenizer: ModelTokenizer  # the policy's

    def score(self, trajectory: Trajectory, prompts: Sequence[Prompt], micro_batches: Sequence[Tensor]) -> Tensor:
        conversations = [
            (
                *prompts[index].messages,
                ChatMessage("assistant", self.tokenizer.decode(trajectory.response_ids(row)).strip()),
            )
            for row, index in enumerate(trajectory.prompt_index.tolist())
        ]
        return torch.tensor(self.model.score(conversations), dtype=torch.float32)
