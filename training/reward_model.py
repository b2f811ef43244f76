"""The reward model: a trunk of its own with its own tokenizer, and a scalar head on the last token of a conversation.

Its directory is a model directory (plain weights, and `adapter/` if adapters were trained) with two further files:
reward_head.safetensors {"weight": (1, hidden) float32} and reward.json, the `RewardRecord`. `training.reward` writes
it; PPO, GRPO and the evaluation read it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quant.errors import CheckpointError
from serving.model.chat_format import ChatFormat, ChatMessage
from serving.model.tokenizer import ModelTokenizer
from training.batches import Batch, Sample, pad_rows
from training.errors import TrainingError
from training.trunk import Compute, choose_compute, final_hidden, inner_model, load_chat_format, load_plain_model

HEAD_FILE = "reward_head.safetensors"
RECORD_FILE = "reward.json"
# Positions of one forward pass when scoring, padding included.
_SCORED_POSITIONS = 8192


@dataclass(frozen=True, slots=True)
class RewardRecord:
    """What belongs to the weights: raw scores on training answers have `mean` and `deviation`.

    trunk_sha256: of the model directory that training started from; equal hashes can share a trunk in memory
    length:       of the longest conversation in training, in tokens
    """

    mean: float
    deviation: float
    trunk_sha256: str
    length: int


class RewardHead(nn.Module):
    """A hidden state to a score in deviations from the mean."""

    def __init__(self, weight: Tensor, mean: float = 0.0, deviation: float = 1.0) -> None:
        """weight: (1, hidden)."""
        super().__init__()
        self.weight = nn.Parameter(weight.float())
        self.mean, self.deviation = mean, deviation

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., hidden) of any float type -> (...) float32."""
        # Not a matrix product: autocast would take that in bfloat16, too coarse to tell good answers apart.
        return ((hidden.float() * self.weight).sum(dim=-1) - self.mean) / self.deviation


def new_head(hidden_size: int, generator: torch.Generator) -> RewardHead:
    """So small that all answers start out equal: normalised hidden states give scores of about hidden ** -0.5."""
    return RewardHead(torch.randn(1, hidden_size, generator=generator) / hidden_size)


class RewardModel(nn.Module):
    """Scores conversations that end with the answer to judge. `score` never changes the model or keeps a graph."""

    def __init__(
        self,
        trunk: nn.Module,
        head: RewardHead,
        tokenizer: ModelTokenizer,
        chat_format: ChatFormat,
        compute: Compute,
        record: RewardRecord,
    ) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head
        self.tokenizer, self.chat_format = tokenizer, chat_format
        self.compute, self.record = compute, record

    @classmethod
    def load(cls, directory: Path, compute: Compute | None = None) -> RewardModel:
        """Raises CheckpointError for a directory that `train reward` did not write whole."""
        compute = compute or choose_compute("auto", "auto")
        record, head = read_reward_record(directory), load_reward_head(directory)
        tokenizer = ModelTokenizer.load(directory)
        chat_format = load_chat_format(directory, tokenizer)
        if chat_format is None:
            raise CheckpointError(f"{directory} has no chat template; a reward model reads conversations")
        trunk = load_plain_model(directory, compute.precision).to(compute.device)
        found, wanted = head.weight.shape[1], hidden_size_of(trunk)
        if found != wanted:
            raise CheckpointError(f"{directory / HEAD_FILE} is for hidden size {found}; the trunk's is {wanted}")
        model = cls(trunk, head.to(compute.device), tokenizer, chat_format, compute, record)
        return model.eval().requires_grad_(False)

    def forward(self, batch: Batch) -> Tensor:
        """(rows,) float32: each row holds one conversation, scored at its last token; with a graph."""
        with self.compute.autocast():
            hidden = final_hidden(self.trunk, batch)
        last = (batch.sample_ids > 0).sum(dim=1) - 1
        return self.head(hidden[torch.arange(hidden.shape[0], device=hidden.device), last])

    def score(self, conversations: Sequence[Sequence[ChatMessage]]) -> list[float]:
        """One number for each conversation, which ends with an assistant's turn: read at its end-of-turn token.

        Too long ones lose their first turns, as in training.
        """
        length = self.record.length
        rows = [fitted_ids(self.chat_format, self.tokenizer, messages, length) for messages in conversations]
        return self.score_ids(rows).tolist()

    @torch.no_grad()
    def score_ids(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """(rows,) float32 in main memory, at the last id of each; ids are of this model's own tokenizer."""
        scores = torch.zeros(len(rows))
        for indices in _by_length([len(row) for row in rows]):
            samples = [Sample(tuple(rows[index]), (False,) * len(rows[index])) for index in indices]
            scores[list(indices)] = self(pad_rows(samples).to(self.compute.device)).cpu()
        return scores


def load_reward_model(directory: Path, compute: Compute) -> RewardModel:
    return RewardModel.load(directory, compute)


def load_reward_head(directory: Path) -> RewardHead:
    """The head with its normalisation, trainable, for a critic that starts from the reward model."""
    record = read_reward_record(directory)
    path = directory / HEAD_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); train the reward model again") from error
    weight = tensors.get("weight")
    if set(tensors) != {"weight"} or weight is None or weight.dim() != 2 or weight.shape[0] != 1:
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise CheckpointError(f"{path} holds {found}; expected one tensor 'weight' of shape (1, hidden)")
    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError(f"{path} holds numbers that are not finite; train the reward model again")
    return RewardHead(weight, record.mean, record.deviation)


def save_reward_head(directory: Path, weight: Tensor, record: RewardRecord) -> tuple[Path, Path]:
    """Write the two files that make a model directory a reward model's. weight: (1, hidden). Returns their paths."""
    head_path, record_path = directory / HEAD_FILE, directory / RECORD_FILE
    save_file({"weight": weight.detach().float().cpu().contiguous()}, head_path)
    record_path.write_text(json.dumps(asdict(record), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return head_path, record_path


def read_reward_record(directory: Path) -> RewardRecord:
    path = directory / RECORD_FILE
    if not path.is_file():
        raise CheckpointError(f"{directory} has no {RECORD_FILE}; give a directory that `causerie train reward` wrote")
    try:
        values = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
        record = RewardRecord(
            float(values["mean"]), float(values["deviation"]), str(values["trunk_sha256"]), int(values["length"])
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a reward model's record ({error!r}); train it again") from error
    if not math.isfinite(record.mean) or not math.isfinite(record.deviation) or record.deviation <= 0:
        raise CheckpointError(f"{path} has mean {record.mean} and deviation {record.deviation}; train the model again")
    return record


def hidden_size_of(model: nn.Module) -> int:
    return int(inner_model(model).config.hidden_size)


def conversation_ids(
    chat_format: ChatFormat, tokenizer: ModelTokenizer, messages: Sequence[ChatMessage]
) -> tuple[int, ...]:
    """Ids up to the last end-of-turn token. What a template writes behind it (a line break) would hide it.

    Raises TrainingError if the last turn is not the assistant's, or does not end in such a token.
    """
    if not messages or messages[-1].role != "assistant":
        raise TrainingError("a conversation to score ends with an assistant's turn; this one does not")
    ids = chat_format.render(messages, add_generation_prompt=False)
    ends = [position for position, token_id in enumerate(ids) if token_id in tokenizer.eos_ids]
    if not ends:
        raise TrainingError("the chat format writes no end-of-turn token; a reward model reads its score there")
    return tuple(ids[: ends[-1] + 1])


def fitted_ids(
    chat_format: ChatFormat, tokenizer: ModelTokenizer, messages: Sequence[ChatMessage], length: int
) -> tuple[int, ...]:
    """At most `length` ids: without as many first exchanges as need be, and of a long last one the end."""
    ids: tuple[int, ...] = ()
    for shorter in shortened(messages):
        ids = conversation_ids(chat_format, tokenizer, shorter)
        if len(ids) <= length:
            return ids
    return ids[-length:]


def shortened(messages: Sequence[ChatMessage]) -> Iterator[tuple[ChatMessage, ...]]:
    """All messages, then without the first exchange, the first two, ... down to the last; a system turn stays."""
    start = 1 if messages[0].role == "system" else 0
    for first in range(start, max(start + 1, len(messages) - 1), 2):
        yield (*messages[:start], *messages[first:])


def _by_length(lengths: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Indices in batches of like length, so that little of a batch is padding."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True):
        if batch and (len(batch) + 1) * lengths[batch[0]] > _SCORED_POSITIONS:
            yield tuple(batch)
            batch = []
        batch.append(index)
    if batch:
        yield tuple(batch)
