"""The memory formulas against what training small models takes in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.training.plan.measured_training import MeasuredRun
from training.plan.devices import DEVICES, Fleet
from training.plan.planner import Layout, TrainWork, device_memory

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[3]
TOLERANCE = 0.15
TIMEOUT_S = 600
PALM = MeasuredRun(
    size="palm-10m",
    layers=6,
    hidden=256,
    heads=8,
    head_dim=32,
    intermediate=1024,
    vocab=2048,
    rows=2,
    length=256,
    checkpointing=False,
)
RUNS = {
    "palm": PALM,
    "palm, checkpointing": replace(PALM, checkpointing=True),
    "palm, mostly activations": replace(PALM, layers=2, rows=4, vocab=256),
    "palm, mostly logits": replace(PALM, layers=1, rows=4, vocab=8192),
    "palm, bfloat16": replace(PALM, bfloat16=True),
    "llama": replace(PALM, size="llama-7b", layers=4),
    "llama, bfloat16": replace(PALM, size="llama-7b", layers=4, rows=4, bfloat16=True),
}


def measured_bytes(runs: Sequence[MeasuredRun]) -> list[int]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        # Every large array is given back as soon as it is freed, so that the process is as large as what lives.
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    script = Path(__file__).with_name("measured_training.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps([asdict(run) for run in runs])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def planned_bytes(run: MeasuredRun) -> float:
    work = TrainWork(run.model_size(), tokens=1, length=run.length, micro_batch_size=run.rows)
    device = replace(DEVICES["cpu"], compute_bytes=2 if run.bfloat16 else 4)
    return device_memory(work, Fleet(1, device), Layout(1, run.checkpointing)).total


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_planned_memory_is_within_15_percent_of_what_training_takes() -> None:
    measured = dict(zip(RUNS, measured_bytes(list(RUNS.values())), strict=True))
    planned = {name: planned_bytes(run) for name, run in RUNS.items()}
    for name in RUNS:
        print(f"{name}: measured {measured[name] / 1e6:.1f} MB, planned {planned[name] / 1e6:.1f} MB")
    assert planned == pytest.approx(measured, rel=TOLERANCE)
