"""Token samples as tensors: packed several to a row, or one to a row; always padded on the right.

Pure: no model, no device. One layout for every stage, so that masks, positions and logits cannot disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation or text. is_target: True on ids that the model is to predict; the first id never counts."""

    ids: tuple[int, ...]
    is_target: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.is_target):
            raise ValueError(f"{len(self.ids)} ids and {len(self.is_target)} marks")

    @property
    def num_targets(self) -> int:
        return sum(self.is_target[1:])


@dataclass(frozen=True, slots=True)
class Batch:
    """All tensors (rows, length).

    input_ids:    int64; 0 on padding
    position_ids: int64, from 0 in each sample; 0 on padding
    sample_ids:   int64, 1, 2, ... within a row; 0 on padding
    is_target:    bool, True where this id is to be predicted from the position before it; never on a sample's first
    """

    input_ids: Tensor
    position_ids: Tensor
    sample_ids: Tensor
    is_target: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self.tensors()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.input_ids, self.position_ids, self.sample_ids, self.is_target

    @property
    def num_targets(self) -> int:
        return int(self.is_target.sum())

    def targets(self) -> Tensor:
        """(num_targets,) int64 ids in row order; `predictors` marks the positions whose logits predict them."""
        return self.input_ids[self.is_target]

    def predictors(self) -> Tensor:
        """(rows, length) bool, True at the position before each target."""
        return torch.cat((self.is_target[:, 1:], torch.zeros_like(self.is_target[:, :1])), dim=1)


def plan_packing(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Indices of samples row by row: first fit, longest first, so that few positions are padding.

    Deterministic. Samples longer than `row_length` are the caller's error.
    """
    too_long = [index for index, length in enumerate(lengths) if length > row_length]
    if too_long:
        raise ValueError(f"sample {too_long[0]} has {lengths[too_long[0]]} tokens; a row holds {row_length}")
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free tokens -> rows, so that a fit is found without a scan of all rows
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        free = min((room for room, waiting in open_rows.items() if room >= lengths[index] and waiting), default=None)
        if free is None:
            rows.append([])
            row, free = len(rows) - 1, row_length
        else:
            row = open_rows[free].pop()
        rows[row].append(index)
        open_rows.setdefault(free - lengths[index], []).append(row)
    return rows


def pack(rows: Sequence[Sequence[Sample]], length: int | None = None) -> Batch:
    """One row of the batch for each list of samples. length: of a row; None takes the longest."""
    sizes = [sum(len(sample.ids) for sample in row) for row in rows]
    width = max(sizes) if length is None else length
    if max(sizes) > width:
        raise ValueError(f"a row of {max(sizes)} tokens does not fit into {width}")
    shape = (len(rows), width)
    input_ids, position_ids, sample_ids = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    is_target = torch.zeros(shape, dtype=torch.bool)
    for row_index, row in enumerate(rows):
        start = 0
        for number, sample in enumerate(row, start=1):
            place = slice(start, start + len(sample.ids))
            input_ids[row_index, place] = torch.tensor(sample.ids)
            position_ids[row_index, place] = torch.arange(len(sample.ids))
            sample_ids[row_index, place] = number
            is_target[row_index, place] = torch.tensor(sample.is_target)
            is_target[row_index, start] = False  # nothing precedes a sample's first id
            start += len(sample.ids)
    return Batch(input_ids, position_ids, sample_ids, is_target)


def pad_rows(samples: Sequence[Sample], length: int | None = None) -> Batch:
    """One sample to a row."""
    return pack([[sample] for sample in samples], length)


def attention_mask(batch: Batch) -> Tensor:
    """(rows, 1, length, length) bool, True where the query (third axis) may attend to the key (fourth).

    Causal, and only within one sample. Padding attends to itself, so that no row of scores is empty.
    """
    same = batch.sample_ids[:, :, None] == batch.sample_ids[:, None, :]
    length = batch.input_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=same.device).tril()
    is_padding = batch.sample_ids == 0
    itself = torch.eye(length, dtype=torch.bool, device=same.device)
    return torch.where(is_padding[:, :, None], itself, same & causal)[:, None]


def is_plain_causal(batch: Batch) -> bool:
    """True if a causal mask alone says the same on every real token: one sample to a row, padding behind it."""
    return bool((batch.sample_ids <= 1).all())
