"""The loop of objectives that learn from what the policy itself samples: roll out, look, update, log, save, go on.

PPO and GRPO are algorithms for it. A checkpoint can be taken between any two optimizer steps: inside an iteration it
holds the iteration's experience too, and the run goes on from there bit for bit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from quant.model_directory import JsonValue
from training.checkpoint import (
    checkpoint_path,
    latest_checkpoint,
    remove_old_checkpoints,
    restore_checkpoint,
    save_checkpoint,
)
from training.errors import TrainingError
from training.experience import Experience, experience_from
from training.loop import StopRequest, stop_on_signal
from training.run_log import RunLog
from training.settings import OptimSettings, RunSettings


class Algorithm(Protocol):
    """What is learned, and how. Everything random is a function of the iteration and the update."""

    @property
    def num_updates(self) -> int:
        """Optimizer steps of an iteration."""
        ...

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """What a checkpoint holds of the models."""
        ...

    @property
    def optimizers(self) -> Mapping[str, Optimizer]: ...

    def gather(self, iteration: int) -> tuple[Experience, Mapping[str, float]]:
        """Sample and judge. Also what to log of it."""
        ...

    def update(self, experience: Experience, iteration: int, index: int) -> Mapping[str, float]:
        """Optimizer step `index` of the iteration. Returns what to log, averaged over the iteration's steps."""
        ...

    def finish(self, values: Mapping[str, float], num_answers: int) -> None:
        """After an iteration, with what was logged of it."""
        ...

    def state(self) -> Mapping[str, JsonValue]: ...

    def restore(self, state: Mapping[str, JsonValue]) -> None: ...


@dataclass(slots=True)
class Progress:
    """Where a run stands. gathered, sums and seconds: of the iteration in progress, None and empty between two."""

    iteration: int = 0
    update: int = 0
    experience: Experience | None = None
    gathered: Mapping[str, float] = field(default_factory=dict[str, float])
    sums: dict[str, float] = field(default_factory=dict[str, float])
    seconds: float = 0.0


def run_iterations(
    algorithm: Algorithm, settings: RunSettings, run_dir: Path, *, stage: str, num_iterations: int
) -> bool:
    """Run to the end. Returns False if it was interrupted; the state is saved then."""
    progress = _resume(algorithm, run_dir) if settings.resume else Progress()
    first = progress.iteration
    with RunLog(run_dir, stage=stage, num_steps=num_iterations, first_step=first) as log, stop_on_signal() as stop:
        while progress.iteration < num_iterations:
            if not _advance(algorithm, progress, stop):
                _save(algorithm, progress, run_dir, settings.keep_checkpoints)
                return False
            values = _close_iteration(algorithm, progress)
            log.record(progress.iteration, values)
            if stop.is_set or progress.iteration % settings.checkpoint_every == 0:
                _save(algorithm, progress, run_dir, settings.keep_checkpoints)
            if stop.is_set:
                return False
    return True


def _advance(algorithm: Algorithm, progress: Progress, stop: StopRequest) -> bool:
    """The rest of the iteration. False if a stop was asked for in the middle of it."""
    started = time.perf_counter()
    if progress.experience is None:
        progress.experience, progress.gathered = algorithm.gather(progress.iteration)
    while progress.update < algorithm.num_updates:
        if stop.is_set:
            progress.seconds += time.perf_counter() - started
            return False
        for name, value in algorithm.update(progress.experience, progress.iteration, progress.update).items():
            progress.sums[name] = progress.sums.get(name, 0.0) + value
        progress.update += 1
    progress.seconds += time.perf_counter() - started
    return True


def _close_iteration(algorithm: Algorithm, progress: Progress) -> dict[str, float]:
    """What to log of the iteration that has ended; `progress` stands before the next one."""
    assert progress.experience is not None
    trajectory = progress.experience.trajectory
    values = {**progress.gathered, **{name: total / algorithm.num_updates for name, total in progress.sums.items()}}
    values["seconds"] = progress.seconds
    values["tokens_per_second"] = int(trajectory.is_response.sum()) / progress.seconds
    algorithm.finish(values, trajectory.num_rows)
    progress.iteration, progress.update, progress.experience = progress.iteration + 1, 0, None
    progress.gathered, progress.sums, progress.seconds = {}, {}, 0.0
    return values


def _save(algorithm: Algorithm, progress: Progress, run_dir: Path, keep: int) -> None:
    record: dict[str, JsonValue] = {
        "iteration": progress.iteration,
        "update": progress.update,
        "gathered": dict(progress.gathered),
        "sums": dict(progress.sums),
        "seconds": progress.seconds,
        "algorithm": algorithm.state(),
    }
    save_checkpoint(
        checkpoint_path(run_dir, progress.iteration * algorithm.num_updates + progress.update),
        modules=algorithm.modules,
        optimizers=algorithm.optimizers,
        record=record,
        tensors=_contiguous(progress.experience.tensors()) if progress.experience is not None else {},
    )
    remove_old_checkpoints(run_dir, keep)


def _resume(algorithm: Algorithm, run_dir: Path) -> Progress:
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None  # run_directory has looked
    record, tensors = restore_checkpoint(checkpoint, algorithm.modules, algorithm.optimizers)
    algorithm.restore(cast("Mapping[str, JsonValue]", record["algorithm"]))
    return Progress(
        iteration=int(str(record["iteration"])),
        update=int(str(record["update"])),
        experience=experience_from(tensors) if tensors else None,
        gathered=cast("Mapping[str, float]", record["gathered"]),
        sums=dict(cast("Mapping[str, float]", record["sums"])),
        seconds=float(str(record["seconds"])),
    )


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def require_one_process(settings: OptimSettings) -> None:
    """Raises TrainingError: answers are sampled where the whole policy is."""
    if settings.sharding != "none" or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainingError(
            "this stage runs in one process, which samples and learns; start it without torchrun and --sharding, and "
            "use --method lora or qlora for a model whose full weights do not fit"
        )
