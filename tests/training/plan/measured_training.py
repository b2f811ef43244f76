"""Trains small models for two steps each and prints how much memory each took: a child process of the tests.

Usage: measured_training.py '[{"size": NAME, "layers": N, ..., "checkpointing": false}, ...]'
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from training.batches import Batch
from training.loop import accumulate, make_optimizer, optimizer_step
from training.packed import PackedObjective
from training.settings import OptimSettings
from training.sizes import ModelSize, config_of, find_size
from training.trunk import Compute, recompute_activations


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """Two micro-batches a step, so that gradients lie beside the second one's activations, as the formulas count."""

    size: str
    layers: int
    hidden: int
    heads: int
    head_dim: int
    intermediate: int
    vocab: int
    rows: int
    length: int
    checkpointing: bool
    bfloat16: bool = False

    def model_size(self) -> ModelSize:
        named = find_size(self.size)
        return replace(
            named,
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=1 if named.kv_heads == 1 else self.heads,
            head_dim=self.head_dim,
            intermediate=self.intermediate,
            vocab=self.vocab,
        )


@dataclass(frozen=True, slots=True)
class RandomRows:
    run: MeasuredRun

    def micro_batches(self, step: int) -> Sequence[Batch]:
        shape = (self.run.rows, self.run.length)
        ids = torch.randint(self.run.vocab, (2, *shape), generator=torch.Generator().manual_seed(step))
        positions = torch.arange(self.run.length).expand(shape)
        is_target = torch.ones(shape, dtype=torch.bool)
        is_target[:, 0] = False
        return [Batch(part, positions, torch.ones_like(part), is_target) for part in ids]


def train(run: MeasuredRun) -> None:
    config = config_of(run.model_size())
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(str(config.pop("model_type")), **config), attn_implementation="sdpa"
    ).train()
    if run.checkpointing:
        recompute_activations(model)
    compute = Compute(torch.device("cpu"), torch.bfloat16 if run.bfloat16 else torch.float32)
    optimizer = make_optimizer(model, OptimSettings(out=Path("unused")))
    objective = PackedObjective(model, compute, RandomRows(run))
    for step in range(2):
        accumulate(objective, objective.micro_batches(step))
        optimizer_step(optimizer, 1e-4, 1.0)


def memory_bytes(name: str) -> int:
    """VmRSS or VmHWM, its highest value since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure(run: MeasuredRun) -> int:
    gc.collect()
    before = memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from now
    train(run)
    return memory_bytes("VmHWM") - before


def main() -> None:
    runs = [
        MeasuredRun(**{field.name: values[field.name] for field in fields(MeasuredRun)})
        for values in json.loads(sys.argv[1])
    ]
    for run in runs:
        # A first tiny run loads whatever is loaded on first use.
        train(replace(run, layers=1, hidden=32, heads=1, head_dim=32, intermediate=32, vocab=64, rows=1, length=16))
    print(json.dumps([measure(run) for run in runs]))


if __name__ == "__main__":
    main()
