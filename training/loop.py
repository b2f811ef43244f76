"""The loop that every supervised stage shares: accumulate gradients, step, log, save, stop and go on.

An objective says what the batches of a step are and what a batch's loss is. Losses are sums with a weight, and the
step divides by the weight of all of its batches: accumulation and several ranks change nothing.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from types import FrameType
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from quant.model_directory import JsonValue
from training.checkpoint import (
    checkpoint_path,
    latest_checkpoint,
    remove_old_checkpoints,
    restore_checkpoint,
    save_checkpoint,
    trainable,
)
from training.distributed import ALONE, Spread, full_tensor, shard_by_deepspeed
from training.errors import TrainingError
from training.run_log import RunLog
from training.schedule import learning_rate_at
from training.settings import OptimSettings, RunSettings

B = TypeVar("B")


class Objective(Protocol[B]):
    """What is learned. Everything is a function of the step alone, so that a resumed run sees the same."""

    def micro_batches(self, step: int) -> Sequence[B]:
        """All batches of optimizer step `step`, over all ranks."""
        ...

    def weight(self, batch: B) -> float:
        """What the batch's loss is divided by, e.g. its target tokens."""
        ...

    def num_tokens(self, batch: B) -> int:
        """Real tokens of the batch, for the speed that is shown."""
        ...

    def loss(self, batch: B) -> tuple[Tensor, Mapping[str, float]]:
        """The SUM over the batch, with its graph, and sums of further quantities to log."""
        ...


@dataclass(slots=True)
class StopRequest:
    """Set by Ctrl-C or SIGTERM: the step in progress is finished, saved, and the run ends."""

    is_set: bool = False


@dataclass(frozen=True, slots=True)
class StepResult:
    """Means over the step's weight."""

    values: Mapping[str, float]
    num_tokens: int


@dataclass(slots=True)
class Learner:
    """A model, the optimizer of its trainable parameters, and how far they are. step: steps done."""

    model: nn.Module
    optimizer: Optimizer
    step: int = 0
    record: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])
    spread: Spread = ALONE


def run_directory(settings: RunSettings) -> Path:
    """OUT.run, after checking that the run may start there. Raises TrainingError."""
    directory = settings.out.with_name(settings.out.name + ".run")
    if settings.resume:
        if isinstance(settings, OptimSettings) and settings.sharding == "deepspeed":
            raise TrainingError("--resume: --sharding deepspeed writes no checkpoints; use --sharding fsdp")
        if latest_checkpoint(directory) is None:
            raise TrainingError(f"--resume: {directory} holds no checkpoint; start without --resume")
    elif latest_checkpoint(directory) is not None:
        raise TrainingError(f"{directory} holds an unfinished run; add --resume to go on, or delete it")
    if settings.out.exists() and any(settings.out.iterdir()):
        raise TrainingError(f"{settings.out} exists and is not empty; choose another --out, or delete it")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def make_optimizer(model: nn.Module, settings: OptimSettings, learning_rate: float | None = None) -> AdamW:
    """AdamW over what is trainable; weight decay on matrices only."""
    parameters = list(trainable(model).values())
    matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
    others = [parameter for parameter in parameters if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate or settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        fused=True,
    )


def make_learner(model: nn.Module, settings: OptimSettings, spread: Spread) -> Learner:
    """The model and its optimizer. With DeepSpeed, the learner's `spread` takes the place of the given one."""
    optimizer = make_optimizer(model, settings)
    if settings.sharding == "deepspeed":
        stage = int(settings.zero_stage)
        spread = shard_by_deepspeed(model, optimizer, spread.ranks, stage, settings.max_grad_norm)
    return Learner(model, optimizer, spread=spread)


def accumulate(objective: Objective[B], batches: Sequence[B], spread: Spread = ALONE) -> StepResult:
    """Add the gradient of the weighted mean loss over `batches` to the parameters.

    batches: of all ranks; each computes its share, and the result is the same on all of them.
    """
    total = sum(objective.weight(batch) for batch in batches)
    if total <= 0:
        raise TrainingError("a step has nothing to learn from: no batch of it holds a target")
    sums: dict[str, float] = {}
    share = spread.share(batches)
    for number, (batch, counts) in enumerate(share, 1):
        loss, values = spread.call(partial(objective.loss, batch))
        # Sharding takes the mean of the ranks' gradients; the loss is a sum over them.
        spread.backward(loss * (counts * spread.ranks.world_size / total), is_last=number == len(share))
        for name, value in {"loss": loss.item(), **values}.items():
            sums[name] = sums.get(name, 0.0) + counts * value
    num_tokens = sum(objective.num_tokens(batch) for batch in batches)
    return StepResult({name: value / total for name, value in spread.sum(sums).items()}, num_tokens)


def optimizer_step(optimizer: Optimizer, learning_rate: float, max_grad_norm: float) -> float:
    """Clip, step and clear. Returns the norm before clipping. Raises TrainingError if it is not a number."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = full_tensor(nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    if not bool(torch.isfinite(norm)):
        raise TrainingError(f"the gradient's norm is {float(norm)}; lower --learning-rate, or resume with another")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


def train_steps(
    learner: Learner,
    objective: Objective[B],
    settings: OptimSettings,
    run_dir: Path,
    *,
    stage: str,
    num_steps: int,
    after_step: Callable[[int], Mapping[str, float]] | None = None,
) -> bool:
    """Run to `num_steps`. Returns False if it was interrupted; the state is saved then.

    With DeepSpeed nothing is saved, and an interruption raises TrainingError.

    after_step: called with the number of steps done; what it returns (a held-out loss) goes into the log.
    """
    if settings.resume:
        resume(learner, run_dir)
    spread = learner.spread
    with _open_log(spread, run_dir, stage, num_steps, learner.step) as log, stop_on_signal() as stop:
        while learner.step < num_steps:
            values = _one_step(learner, objective, settings, num_steps)
            if after_step is not None:
                values |= spread.call(partial(after_step, learner.step))
            if log is not None and (learner.step % settings.log_every == 0 or learner.step == num_steps):
                log.record(learner.step, values)
            is_stopping = spread.is_any(stop.is_set)
            if is_stopping and spread.zero is not None:
                raise TrainingError(f"stopped after step {learner.step}; --sharding deepspeed saves only the end")
            # At the end too: what follows (measuring, publishing) may fail, and --resume goes on there.
            is_due = learner.step % settings.checkpoint_every == 0 or learner.step == num_steps
            if spread.zero is None and (is_stopping or is_due):
                save(learner, run_dir, settings.keep_checkpoints)
            if is_stopping:
                return False
    return True


def _open_log(
    spread: Spread, run_dir: Path, stage: str, num_steps: int, first_step: int
) -> AbstractContextManager[RunLog | None]:
    if not spread.ranks.is_first:
        return nullcontext()
    return RunLog(run_dir, stage=stage, num_steps=num_steps, first_step=first_step)


def resume(learner: Learner, run_dir: Path) -> None:
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None  # run_directory has looked
    record, _ = restore_checkpoint(
        checkpoint, {"model": learner.model}, {"optimizer": learner.optimizer}, learner.spread.ranks
    )
    learner.step = int(str(record["step"]))
    learner.record = record


def save(learner: Learner, run_dir: Path, keep: int) -> None:
    save_checkpoint(
        checkpoint_path(run_dir, learner.step),
        modules={"model": learner.model},
        optimizers={"optimizer": learner.optimizer},
        record={**learner.record, "step": learner.step},
        ranks=learner.spread.ranks,
    )
    if learner.spread.ranks.is_first:
        remove_old_checkpoints(run_dir, keep)


@contextmanager
def stop_on_signal() -> Generator[StopRequest]:
    """The first Ctrl-C or SIGTERM asks for a stop after the step; a second one ends at once."""
    stop = StopRequest()
    before: dict[int, signal.Handlers | Callable[[int, FrameType | None], object] | int | None] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set:
            raise KeyboardInterrupt
        stop.is_set = True

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    except ValueError:  # not the main thread: whoever started it decides
        pass
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@lru_cache(maxsize=2)
def epoch_order(num_rows: int, epoch: int, seed: int) -> tuple[int, ...]:
    """The rows of an epoch in random order: a function of its arguments alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return tuple(torch.randperm(num_rows, generator=generator).tolist())


def rows_of_step(step: int, *, num_rows: int, batch_size: int, seed: int) -> list[int]:
    """Which rows step `step` learns from: epochs in random order, one after the other without a gap."""
    rows: list[int] = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, num_rows)
        rows.append(epoch_order(num_rows, epoch, seed)[offset])
    return rows


def count_steps(num_rows: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    steps = max(1, round(num_rows * epochs / batch_size))
    return steps if max_steps is None else min(steps, max_steps)


def parts(rows: Sequence[B], size: int) -> list[Sequence[B]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _one_step(learner: Learner, objective: Objective[B], settings: OptimSettings, num_steps: int) -> dict[str, float]:
    started = time.perf_counter()
    rate = learning_rate_at(
        learner.step,
        num_steps,
        peak=settings.learning_rate,
        schedule=settings.schedule,
        warmup=settings.warmup,
        final_share=settings.final_learning_rate,
    )
    result = accumulate(objective, objective.micro_batches(learner.step), learner.spread)
    zero = learner.spread.zero
    norm = zero.step(rate) if zero else optimizer_step(learner.optimizer, rate, settings.max_grad_norm)
    learner.step += 1
    elapsed = time.perf_counter() - started
    return {
        **result.values,
        "learning_rate": rate,
        "grad_norm": norm,
        "tokens_per_second": result.num_tokens / elapsed,
    }
