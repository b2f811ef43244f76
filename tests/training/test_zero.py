"""DeepSpeed's ZeRO on two ranks writes what one process writes; what it cannot do is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from serving import cli
from tests.training.rl_world import write_model
from tests.training.test_distributed import run_on_two_ranks
from training import zero
from training.data.generated import generate_rankings
from training.data.records import encode_row
from training.distributed import ONE_RANK, spread_model
from training.errors import TrainingError
from training.loop import run_directory
from training.settings import RewardSettings
from training.zero import require_deepspeed

CPU = torch.device("cpu")
is_installed = importlib.util.find_spec("deepspeed") is not None


@pytest.mark.system
@pytest.mark.skipif(not is_installed, reason="DeepSpeed is not installed (pip install deepspeed)")
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_a_stage_on_two_ranks_writes_what_one_process_writes(tmp_path: Path, stage: str) -> None:
    model, data = write_model(tmp_path / "sft"), tmp_path / "rankings.jsonl"
    data.write_bytes(b"".join(encode_row(row) + b"\n" for row in generate_rankings("train", 24)))
    flags = [
        "--model",
        str(model),
        "--data",
        str(data),
        "--method",
        "full",
        "--precision",
        "float32",
        "--device",
        "cpu",
    ]
    # Three batches to a step: one rank has one more than the other. Clipped, and at a rate that changes.
    flags += ["--length", "96", "--batch-size", "6", "--micro-batch-size", "2", "--max-steps", "3"]
    train = ["train", "reward", *flags, "--max-grad-norm", "0.5", "--learning-rate", "1e-3", "--warmup", "0.5"]
    deepspeed = ["--sharding", "deepspeed", "--zero-stage", stage, "--out", str(tmp_path / "two")]
    done = run_on_two_ranks("tests.training.zero_program", [*train, *deepspeed])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("held out") == 1
    assert cli.main([*train, "--out", str(tmp_path / "one")]) == 0
    before = load_file(model / "model.safetensors")
    for name in ("model.safetensors", "reward_head.safetensors"):
        one, two = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        assert set(one) == set(two)
        assert all(torch.allclose(tensor, two[key], atol=1e-5) for key, tensor in one.items())
        assert not any(torch.allclose(two[key], before[key], atol=1e-4) for key in two if key in before)


def found_nothing(name: str) -> None:
    """A `find_spec` of an environment without the package."""


def found_something(name: str) -> object:
    return object()


@pytest.mark.unit
def test_a_missing_deepspeed_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", found_nothing)
    with pytest.raises(TrainingError, match="pip install deepspeed"):
        require_deepspeed(nn.Linear(2, 2), torch.device("cuda"))


@pytest.mark.unit
def test_a_cpu_and_frozen_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", found_something)
    with pytest.raises(TrainingError, match="needs GPUs and would run on cpu"):
        require_deepspeed(nn.Linear(2, 2), CPU)
    monkeypatch.setattr(zero, "DEVICES", ("cpu",))
    require_deepspeed(nn.Linear(2, 2), CPU)
    with pytest.raises(TrainingError, match="add --method full"):
        require_deepspeed(nn.Linear(2, 2).requires_grad_(False), CPU)


@pytest.mark.unit
def test_a_single_process_names_the_launcher() -> None:
    with pytest.raises(TrainingError, match="--sharding deepspeed needs processes to shard over"):
        spread_model(nn.Linear(2, 2), ONE_RANK, "deepspeed", device=CPU, precision=torch.float32)


@pytest.mark.unit
def test_resuming_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": tmp_path, "data": (tmp_path,), "out": tmp_path / "out"}
    with pytest.raises(TrainingError, match="deepspeed writes no checkpoints"):
        run_directory(RewardSettings(**settings, sharding="deepspeed", resume=True))
