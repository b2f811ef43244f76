"""The shared loop: accumulation changes nothing, interruption loses nothing, and a resumed run is the same run."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests.training.tiny_directory import CPU
from tests.training.tiny_llama import random_samples, tiny_llama
from training.batches import Batch
from training.errors import TrainingError
from training.loop import (
    Learner,
    accumulate,
    count_steps,
    epoch_order,
    make_optimizer,
    optimizer_step,
    rows_of_step,
    run_directory,
    train_steps,
)
from training.options import build_settings
from training.packed import PackedData, PackedObjective
from training.run_log import read_log
from training.settings import SftSettings

pytestmark = pytest.mark.unit

NUM_STEPS = 6


def sft_settings(tmp_path: Path, **changes: object) -> SftSettings:
    values: dict[str, object] = {"out": tmp_path / "out", "data": ["d"], "model": "m", "checkpoint_every": 2, **changes}
    return build_settings(SftSettings, values)


def data(micro_batch_size: int) -> PackedData:
    return PackedData([[sample] for sample in random_samples(10)], 4, micro_batch_size, seed=3)


class Interrupting:
    """An objective during whose step `at` the run is asked to stop, as Ctrl-C does."""

    def __init__(self, inner: PackedObjective, at: int) -> None:
        self._inner, self._at = inner, at

    def micro_batches(self, step: int) -> Sequence[Batch]:
        if step == self._at:
            os.kill(os.getpid(), signal.SIGINT)
        return self._inner.micro_batches(step)

    def weight(self, batch: Batch) -> float:
        return self._inner.weight(batch)

    def num_tokens(self, batch: Batch) -> int:
        return self._inner.num_tokens(batch)

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        return self._inner.loss(batch)


def train(settings: SftSettings, *, stop_at: int | None = None) -> tuple[bool, nn.Module]:
    run_dir = run_directory(settings)
    torch.manual_seed(settings.seed)
    model = tiny_llama(seed=1)
    # Dropout draws from the generator, so that its state matters too.
    for layer in model.modules():
        if hasattr(layer, "attention_dropout"):
            cast("Any", layer).attention_dropout = 0.2
    learner = Learner(model, make_optimizer(model, settings))
    objective = PackedObjective(model, CPU, data(2))
    chosen = objective if stop_at is None else Interrupting(objective, stop_at)
    return train_steps(learner, chosen, settings, run_dir, stage="test", num_steps=NUM_STEPS), model


def gradients_of(micro_batch_size: int) -> list[Tensor]:
    model = tiny_llama()
    objective = PackedObjective(model, CPU, data(micro_batch_size))
    accumulate(objective, objective.micro_batches(0))
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_accumulation_gives_the_whole_batchs_gradient(size: int) -> None:
    for found, expected in zip(gradients_of(size), gradients_of(4), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    is_done, whole = train(sft_settings(tmp_path / "whole"))
    assert is_done
    settings = sft_settings(tmp_path / "parts")
    was_done, _ = train(settings, stop_at=3)
    assert not was_done
    is_done, resumed = train(replace(settings, resume=True))
    assert is_done
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name
    logs = [read_log(tmp_path / place / "out.run") for place in ("whole", "parts")]
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]
    assert [row["step"] for row in logs[1]] == [1, 2, 3, 4, 5, 6]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    train(sft_settings(tmp_path, keep_checkpoints=1))
    assert [path.name for path in (tmp_path / "out.run").glob("checkpoint-*")] == ["checkpoint-00000006"]


def test_a_run_that_exists_is_not_started_over(tmp_path: Path) -> None:
    settings = sft_settings(tmp_path)
    with pytest.raises(TrainingError, match="holds no checkpoint; start without --resume"):
        run_directory(replace(settings, resume=True))
    train(settings, stop_at=1)
    with pytest.raises(TrainingError, match="holds an unfinished run; add --resume"):
        run_directory(settings)


def test_an_output_that_exists_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").touch()
    with pytest.raises(TrainingError, match="exists and is not empty"):
        run_directory(sft_settings(tmp_path))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    settings = sft_settings(tmp_path)
    train(settings, stop_at=1)
    model = tiny_llama(layers=1)
    learner = Learner(model, make_optimizer(model, settings))
    with pytest.raises(TrainingError, match="was written with other settings"):
        train_steps(
            learner,
            PackedObjective(model, CPU, data(2)),
            replace(settings, resume=True),
            tmp_path / "out.run",
            stage="test",
            num_steps=2,
        )


def test_an_infinite_gradient_stops_the_run_before_it_harms() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.weight.grad = torch.full_like(model.weight, float("inf"))
    before = model.weight.detach().clone()
    with pytest.raises(TrainingError, match="gradient's norm is inf"):
        optimizer_step(optimizer, 1.0, 1.0)
    assert torch.equal(model.weight, before)


def test_weight_decay_spares_norms() -> None:
    model = tiny_llama()
    optimizer = make_optimizer(
        model, build_settings(SftSettings, {"out": "o", "data": ["d"], "model": "m", "weight_decay": 0.1})
    )
    decayed = {
        id(parameter) for group in optimizer.param_groups if group["weight_decay"] for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == ("norm" not in name), name


def test_every_row_is_seen_once_an_epoch() -> None:
    rows = [row for step in range(5) for row in rows_of_step(step, num_rows=10, batch_size=4, seed=0)]
    assert sorted(rows[:10]) == list(range(10)) == sorted(rows[10:])
    assert rows[:10] != rows[10:]
    assert epoch_order(10, 0, 0) != epoch_order(10, 0, 1)


def test_steps_follow_from_epochs_and_their_limit() -> None:
    assert count_steps(100, 8, 2.0, None) == 25
    assert count_steps(100, 8, 2.0, 7) == 7
    assert count_steps(3, 8, 0.1, None) == 1
