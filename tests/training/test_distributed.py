"""Sharded steps on two ranks give one process's gradients; what is not really sharded is refused."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from serving import cli
from tests.training.rl_world import write_model
from tests.training.tiny_llama import tiny_llama
from training.data.generated import generate_rankings
from training.data.records import encode_row
from training.distributed import ALONE, ONE_RANK, Ranks, Spread, full_tensors, layers_of, require_sharded, spread_model
from training.errors import TrainingError

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def run_on_two_ranks(module: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    return subprocess.run(
        [*launcher, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def sharded_result(tmp_path: Path, *options: str) -> dict[str, Any]:
    done = run_on_two_ranks("tests.training.rank_program", [str(tmp_path / "checkpoint"), *options])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.system
@pytest.mark.parametrize("options", [(), ("offload", "checkpointing")], ids=["plain", "offload"])
def test_two_ranks_give_one_processs_gradients(tmp_path: Path, options: tuple[str, ...]) -> None:
    found = sharded_result(tmp_path, *options)
    assert found["ranks"] == 2
    assert found["all_dtensors"]
    assert found["local_elements"] <= found["elements"] / 2 + 100
    assert found["gradient_scale"] > 0.1
    assert found["gradient_error"] <= 1e-6
    assert found["loss_gap"] <= 1e-6
    assert found["token_gap"] == 0
    assert found["resumed_equal"]
    assert found["tied"]


@pytest.mark.system
def test_gathered_weights_in_bfloat16_stay_near_and_resume_bit_for_bit(tmp_path: Path) -> None:
    found = sharded_result(tmp_path, "bfloat16")
    assert 0 < found["gradient_error"] <= 0.1 * found["gradient_scale"]
    assert found["resumed_equal"]


@pytest.mark.system
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_stage_on_two_ranks_writes_what_one_process_writes(tmp_path: Path, method: str) -> None:
    model, data = write_model(tmp_path / "sft"), tmp_path / "rankings.jsonl"
    data.write_bytes(b"".join(encode_row(row) + b"\n" for row in generate_rankings("train", 24)))
    flags = ["--model", str(model), "--data", str(data), "--method", method, "--precision", "float32"]
    flags += ["--length", "96", "--batch-size", "6", "--micro-batch-size", "2", "--max-steps", "2"]
    train = ["train", "reward", *flags]
    done = run_on_two_ranks("serving.cli", [*train, "--sharding", "fsdp", "--out", str(tmp_path / "two")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("held out") == 1
    assert cli.main([*train, "--out", str(tmp_path / "one")]) == 0
    for name in ("model.safetensors", "reward_head.safetensors"):
        one, two = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        assert set(one) == set(two)
        assert all(torch.allclose(tensor, two[key], atol=1e-5) for key, tensor in one.items())
    refused = run_on_two_ranks("serving.cli", [*train, "--out", str(tmp_path / "refused")])
    assert "2 processes and --sharding none" in refused.stderr
    assert refused.returncode != 0


@pytest.mark.unit
def test_plain_parameters_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"parameters are not sharded, model\.embed_tokens\.weight among them"):
        require_sharded(tiny_llama())


@pytest.mark.unit
def test_several_processes_without_sharding_are_refused() -> None:
    with pytest.raises(TrainingError, match="2 processes and --sharding none"):
        spread_model(tiny_llama(), Ranks(0, 2), "none", device=CPU, precision=torch.float32)


@pytest.mark.unit
def test_sharding_in_a_single_process_names_the_launcher() -> None:
    with pytest.raises(TrainingError, match="torchrun --nproc-per-node"):
        spread_model(tiny_llama(), ONE_RANK, "fsdp", device=CPU, precision=torch.float32)


@pytest.mark.unit
@pytest.mark.parametrize("num_batches", [1, 2, 3, 6, 7])
def test_shares_hold_each_batch_once_and_are_equally_many(num_batches: int) -> None:
    batches = list(range(num_batches))
    shares = [Spread(Ranks(rank, 3)).share(batches) for rank in range(3)]
    assert sorted(batch for share in shares for batch, counts in share if counts) == batches
    assert len({len(share) for share in shares}) == 1


@pytest.mark.unit
def test_one_process_takes_all_batches_and_calls_the_model_directly() -> None:
    assert ALONE.share("ab") == [("a", True), ("b", True)]
    assert ALONE.call(lambda: 3) == 3
    assert ALONE.sum({"loss": 2.0}) == {"loss": 2.0}
    assert not ALONE.is_any(False)


@pytest.mark.unit
def test_layers_are_the_transformers_blocks() -> None:
    model = tiny_llama(layers=3)
    assert list(layers_of(model)) == list(model.model.layers)


@pytest.mark.unit
def test_tied_weights_stay_one_tensor_when_gathered() -> None:
    state = full_tensors(tiny_llama())
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
