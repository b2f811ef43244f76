"""Checkpoints to resume from: tensors as safetensors, everything else as JSON, whole or not at all. No pickle.

A checkpoint holds the trainable parameters, the optimizers' states, the random number generators and a record of the
stage's own (data position, KL controller, ...). Restoring it makes the next step what it would have been, bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from quant.model_directory import JsonValue, publish_directory
from training.distributed import ONE_RANK, Ranks, full_tensor, like, on_all_ranks
from training.errors import TrainingError

_TENSORS = "state.safetensors"
_RECORD = "state.json"
_PREFIX = "checkpoint-"
_RNG_CPU = "rng.cpu"
_RNG_CUDA = "rng.cuda"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / f"{_PREFIX}{step:08d}"


def latest_checkpoint(run_dir: Path) -> Path | None:
    found = sorted(run_dir.glob(f"{_PREFIX}*"))
    return found[-1] if found else None


def remove_old_checkpoints(run_dir: Path, keep: int) -> None:
    for path in sorted(run_dir.glob(f"{_PREFIX}*"))[:-keep]:
        shutil.rmtree(path)


def save_checkpoint(
    directory: Path,
    *,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    record: Mapping[str, JsonValue],
    tensors: Mapping[str, Tensor] | None = None,
    ranks: Ranks = ONE_RANK,
) -> None:
    """Write `directory` whole. `record` and `tensors` come back from `restore_checkpoint` as they are.

    All ranks call it; sharded tensors are put together, and the first rank writes.
    """
    state: dict[str, Tensor] = {f"extra.{name}": tensor for name, tensor in (tensors or {}).items()}
    for module_name, module in modules.items():
        state |= {f"module.{module_name}.{name}": tensor for name, tensor in trainable(module).items()}
    for name, optimizer in optimizers.items():
        state |= _optimizer_tensors(name, optimizer)
    # Copies, because safetensors refuses views of one storage.
    whole = {name: full_tensor(tensor.detach()).cpu().clone() for name, tensor in state.items()}
    whole |= _generator_states(ranks)
    if ranks.is_first:
        with publish_directory(directory) as partial:
            save_file(whole, partial / _TENSORS)
            (partial / _RECORD).write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")


def restore_checkpoint(
    directory: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    ranks: Ranks = ONE_RANK,
) -> tuple[Mapping[str, JsonValue], dict[str, Tensor]]:
    """Put modules, optimizers and generators back. Returns (record, tensors) of the stage.

    Raises TrainingError where the checkpoint does not fit: unreadable, or written with other settings.
    """
    try:
        state = load_file(directory / _TENSORS)
        record = cast("Mapping[str, JsonValue]", json.loads((directory / _RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, SafetensorError) as error:
        cure = "delete it and resume again"
        raise TrainingError(f"{directory} is not a readable checkpoint ({error}); {cure}") from error
    for module_name, module in modules.items():
        _restore_module(directory, module, _under(state, f"module.{module_name}."))
    for name, optimizer in optimizers.items():
        _restore_optimizer(directory, optimizer, _under(state, f"optimizer.{name}."))
    _restore_generators(directory, state, ranks)
    return record, _under(state, "extra.")


def _generator_states(ranks: Ranks) -> dict[str, Tensor]:
    """Of every rank."""
    states = {_of_rank(_RNG_CPU, rank): state for rank, state in enumerate(on_all_ranks(torch.get_rng_state(), ranks))}
    if torch.cuda.is_available():
        of_gpus = on_all_ranks(torch.cuda.get_rng_state(), ranks)
        states |= {_of_rank(_RNG_CUDA, rank): state for rank, state in enumerate(of_gpus)}
    return states


def _of_rank(name: str, rank: int) -> str:
    return name if rank == 0 else f"{name}.{rank}"


def _restore_generators(directory: Path, state: Mapping[str, Tensor], ranks: Ranks) -> None:
    num_ranks = sum(name.startswith(_RNG_CPU) for name in state)
    if num_ranks != ranks.world_size:
        raise TrainingError(
            f"{directory} was written by {num_ranks} ranks, and {ranks.world_size} would go on; start {num_ranks}"
        )
    torch.set_rng_state(state[_of_rank(_RNG_CPU, ranks.rank)])
    on_gpu = _of_rank(_RNG_CUDA, ranks.rank)
    if torch.cuda.is_available() and on_gpu in state:
        torch.cuda.set_rng_state(state[on_gpu])


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that learn, by name; a shared one once."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _optimizer_tensors(name: str, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every per-parameter tensor of the state, under the parameter's index in the optimizer's own order."""
    states = cast("dict[int, dict[str, Any]]", optimizer.state_dict()["state"])
    return {
        f"optimizer.{name}.{index}.{key}": torch.as_tensor(value)
        for index, entries in states.items()
        for key, value in entries.items()
    }


def _restore_module(directory: Path, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    parameters = trainable(module)
    if set(parameters) != set(tensors):
        odd = sorted(set(parameters) ^ set(tensors))
        raise TrainingError(f"{directory} was written with other settings: {odd[0]} is not in both ({len(odd)} differ)")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                found, wanted = tuple(tensors[name].shape), tuple(parameter.shape)
                raise TrainingError(f"{directory}: {name} is {found}; these settings make it {wanted}")
            parameter.copy_(like(tensors[name], parameter))


def _restore_optimizer(directory: Path, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    whole = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        if int(index) >= len(parameters):
            raise TrainingError(f"{directory} holds state of parameter {index}; the optimizer has {len(parameters)}")
        parameter = parameters[int(index)]
        # Moments are sharded as their parameter is; the step's count is one number.
        placed = like(tensor, parameter) if tensor.shape == parameter.shape and tensor.dim() > 0 else tensor
        states.setdefault(int(index), {})[key] = placed
    optimizer.load_state_dict({"state": states, "param_groups": whole["param_groups"]})


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
