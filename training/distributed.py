"""Several processes train one model: parameters, gradients and optimizer state sharded by FSDP2, called directly.

Or by DeepSpeed (`zero.py`), whose engine takes the optimizer as well and so starts later, in `shard_by_deepspeed`.

torchrun starts the processes (`torchrun --nproc-per-node 8 -m serving.cli train sft --sharding fsdp ...`). Every rank
knows all batches of a step and takes its share of them; only the first rank logs and writes. On one rank, and without
sharding, everything here does nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeAlias, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from training.errors import TrainingError
from training.zero import ZeroEngine, gathered, is_partitioned, require_deepspeed, start_engine

Sharding: TypeAlias = Literal["none", "fsdp", "deepspeed"]
B = TypeVar("B")
T = TypeVar("T")
_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a run. local_rank: among those on this machine; it picks the GPU."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Only this one logs and writes files."""
        return self.rank == 0


ONE_RANK = Ranks()


@dataclass(frozen=True, slots=True)
class Spread:
    """A model and the ranks that it is spread over. root: None where it is not sharded. zero: DeepSpeed's engine."""

    ranks: Ranks = ONE_RANK
    root: nn.Module | None = None
    zero: ZeroEngine | None = None

    def call(self, compute: Callable[[], T]) -> T:
        """`compute`, which may run the model. Every rank has to make the same calls in the same order."""
        return compute() if self.root is None else cast("T", self.root(compute))

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add this rank's gradient of `loss`. is_last: of the step."""
        if self.zero is None:
            loss.backward()
        else:
            self.zero.backward(loss, is_last=is_last)

    def share(self, batches: Sequence[B]) -> list[tuple[B, bool]]:
        """This rank's batches. False marks one that only keeps the ranks in step and must count for nothing."""
        count = self.ranks.world_size
        num_rounds = -(-len(batches) // count)
        places = range(self.ranks.rank, num_rounds * count, count)
        return [(batches[place], True) if place < len(batches) else (batches[0], False) for place in places]

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        return all_reduce_sums(values, self.ranks)

    def is_any(self, flag: bool) -> bool:
        """True on all ranks if it is on one."""
        return self.sum({"flag": float(flag)})["flag"] > 0


ALONE = Spread()


@contextlib.contextmanager
def join_ranks(device: torch.device) -> Generator[Ranks]:
    """This process's place among those that torchrun (or `accelerate launch`) started, alone otherwise."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks()
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        torch.cuda.set_device(local_rank)
    # gloo beside NCCL, for what lies in main memory: sums to log, generators' states, offloaded gradients.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), local_rank)
    finally:
        dist.destroy_process_group()


def spread_model(
    model: nn.Module,
    ranks: Ranks,
    sharding: Sharding,
    *,
    device: torch.device,
    precision: torch.dtype,
    cpu_offload: bool = False,
    in_float32: Sequence[nn.Module] = (),
) -> Spread:
    """Shard `model` in place over all ranks, before its optimizer is made. Raises TrainingError.

    precision: of what is gathered for computing; shards and the reduced gradients stay float32.
    in_float32: parts that are gathered as they are (a reward head).
    """
    if sharding == "none":
        if ranks.world_size > 1:
            raise TrainingError(
                f"{ranks.world_size} processes and --sharding none: each would train a model of its own; "
                "add --sharding fsdp, or start one process"
            )
        return ALONE
    if not dist.is_initialized():
        raise TrainingError(
            f"--sharding {sharding} needs processes to shard over; start them with torchrun: "
            "torchrun --nproc-per-node 2 -m serving.cli train ..."
        )
    if sharding == "deepspeed":
        require_deepspeed(model, device)
        return Spread(ranks)
    root = _shard(model, device, precision, cpu_offload, in_float32)
    require_sharded(model)
    return Spread(ranks, root)


def shard_by_deepspeed(model: nn.Module, optimizer: Optimizer, ranks: Ranks, stage: int, max_norm: float) -> Spread:
    """What `spread_model` leaves to do with DeepSpeed: until now `model` is whole on every rank."""
    zero = start_engine(_Root(model), optimizer, stage, max_norm)
    return Spread(ranks, zero.engine, zero)


def require_sharded(model: nn.Module) -> None:
    """Raises TrainingError unless every parameter is a DTensor.

    A launcher may have wrapped the model before, and fallen back to plain replicas where it found no GPU (accelerate
    does, without a word): then every rank would hold everything.
    """
    whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if whole:
        raise TrainingError(
            f"{len(whole)} parameters are not sharded, {whole[0]} among them: every rank would hold them whole; "
            "start the ranks with torchrun and --sharding fsdp, not with a launcher that wraps the model itself"
        )


def all_reduce_sums(values: Mapping[str, float], ranks: Ranks) -> dict[str, float]:
    """Sums over the ranks, each of which must give the same names in the same order."""
    if ranks.world_size == 1:
        return dict(values)
    sums = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


def on_all_ranks(tensor: Tensor, ranks: Ranks) -> list[Tensor]:
    """Every rank's tensor (in main memory, of one shape), in the order of the ranks, on all of them."""
    if ranks.world_size == 1:
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(ranks.world_size)]
    dist.all_gather(found, tensor)
    return found


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, in main memory on every rank; others as they are. All ranks must call it."""
    if is_partitioned(tensor):
        return gathered(tensor)
    if not isinstance(tensor, DTensor):
        return tensor
    on_mesh = cast("DTensor", tensor.detach().to(tensor.device_mesh.device_type))
    return on_mesh.full_tensor().cpu()


def full_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's whole state by name on the first rank, tied entries as one tensor; nothing on the others.

    All ranks must call it. One tensor at a time is whole on a rank that does not keep it.
    """
    keeps = not dist.is_initialized() or dist.get_rank() == 0
    found: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in found:
            whole = full_tensor(tensor if is_partitioned(tensor) else tensor.detach())
            found[id(tensor)] = whole if keeps else torch.empty(0)
        state[name] = found[id(tensor)]
    return state if keeps else {}


def like(whole: Tensor, place: Tensor) -> Tensor:
    """`whole`, which every rank holds, sharded as `place` is; as it is where `place` is not sharded."""
    if not isinstance(place, DTensor):
        return whole
    moved = whole.to(place.device_mesh.device_type)
    sharded = distribute_tensor(moved, place.device_mesh, place.placements, src_data_rank=None)
    return sharded.to(place.device)


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


class _Root(nn.Module):
    """The root of a sharded model. Its forward runs any computation on the model.

    Stages call parts of a model (its body, then its head on some rows); FSDP gathers a module's weights when that
    module's forward starts. So everything runs inside the forward of this one, which owns what lies outside the layers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], Any]) -> Any:
        return compute()


def _shard(
    model: nn.Module, device: torch.device, precision: torch.dtype, cpu_offload: bool, in_float32: Sequence[nn.Module]
) -> nn.Module:
    """Layer by layer, so that one layer at a time is whole; then the rest."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
    reduced = precision if precision != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=reduced, reduce_dtype=torch.float32 if reduced else None)
    for module in in_float32:
        fully_shard(module, mesh=mesh, offload_policy=offload)
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload)
    root = _Root(model)
    # FSDP would leave the root's weights whole after a forward pass without a backward one, and an optimizer or a
    # checkpoint made then would hold those and not the shards.
    fully_shard(root, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=True)
    return root


def layers_of(model: nn.Module) -> Sequence[nn.Module]:
    """The blocks of the transformer inside `model`: its longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return tuple(max(lists, key=len)) if lists else ()
