"""Causerie's side of benchmarks/training.py: one measurement in a process of its own, one JSON line at the end.

python -m benchmarks.training_ours sft TASK.json
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from training.batches import Batch, Sample, pad_rows
from training.loop import Learner, make_optimizer, train_steps
from training.packed import PackedObjective
from training.settings import PpoSettings, RewardSettings, SftSettings
from training.trunk import choose_compute, load_trunk


def main(argv: Sequence[str]) -> None:
    kind, path = argv
    task: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.set_num_threads(task["threads"])
    with tempfile.TemporaryDirectory() as folder:
        result = {"sft": sft, "ppo": ppo, "reward": reward}[kind](task, Path(folder))
    print(json.dumps(result))


class GivenRows:
    """The task's rows in their order, as many a step as it says: what the peer gets, too."""

    def __init__(self, task: Mapping[str, Any]) -> None:
        self._rows, self._size = task["rows"], task["batch_size"]

    def micro_batches(self, step: int) -> list[Batch]:
        rows = self._rows[step * self._size : (step + 1) * self._size]
        return [pad_rows([Sample(tuple(row["input_ids"]), tuple(x != -100 for x in row["labels"])) for row in rows])]


def sft(task: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    settings = SftSettings(
        model=Path(task["model"]),
        data=(),
        out=folder / "out",
        precision="bfloat16",
        schedule="constant",
        warmup=0.0,
        batch_size=task["batch_size"],
        **task["optimizer"],
        **task["adapter"],
    )
    compute = choose_compute("cpu", settings.precision)
    torch.manual_seed(0)
    trunk = load_trunk(settings.model, compute, settings)
    learner = Learner(trunk.model, make_optimizer(trunk.model, settings))
    ends: list[float] = []

    def note_end(_: int) -> dict[str, float]:
        ends.append(time.perf_counter())
        return {}

    objective = PackedObjective(trunk.model, compute, GivenRows(task))
    train_steps(learner, objective, settings, folder, stage="sft", num_steps=task["steps"], after_step=note_end)
    return {"ends": ends, "losses": _column(folder, "loss")}


def ppo(task: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    from training.ppo import run

    out = folder / "out"
    run(
        PpoSettings(
            model=Path(task["model"]),
            reward_model=Path(task["reward_model"]),
            data=(Path(task["prompts"]),),
            out=out,
            iterations=task["iterations"],
            rollout_size=task["rollout_size"],
            batch_size=task["rollout_size"],
            micro_batch_size=task["micro_batch_size"],
            epochs=task["epochs"],
            max_new_tokens=task["max_new_tokens"],
            max_prompt_tokens=task["max_prompt_tokens"],
            precision=task["precision"],
            **task["adapter"],
        )
    )
    return {"seconds": _column(out, "seconds"), "tokens_per_s": _column(out, "tokens_per_second")}


def reward(task: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    from training.reward import run

    out = folder / "out"
    started = time.perf_counter()
    run(
        RewardSettings(
            model=Path(task["model"]),
            data=(Path(task["train"]),),
            eval_data=(Path(task["test"]),),
            out=out,
            precision="bfloat16",
            schedule="constant",
            warmup=0.0,
            length=task["length"],
            batch_size=task["batch_size"],
            micro_batch_size=task["batch_size"],
            **task["optimizer"],
            **task["adapter"],
        )
    )
    report = json.loads((out / "reward_report.json").read_text(encoding="utf-8"))
    return {"accuracy": report["accuracy"], "seconds": time.perf_counter() - started}


def _column(run_dir: Path, name: str) -> list[float]:
    with (run_dir / "log.csv").open(encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


if __name__ == "__main__":
    main(sys.argv[1:])
