"""From a model, devices and a number of tokens to a plan: the first layout that fits, its memory, time and cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from training.plan import formulas
from training.plan.devices import Fleet
from training.plan.formulas import Method, WeightBits
from training.sizes import ModelSize

__all__ = ["USABLE_MEMORY", "DeviceMemory", "Layout", "ServePlan", "TrainPlan", "TrainWork", "plan_serve", "plan_train"]

# The rest is the driver's, the libraries' and lost between blocks.
USABLE_MEMORY = 0.92
# Of the data sheet's bandwidth, reached by decoding.
BANDWIDTH_SHARE = 0.6
HOURS_A_YEAR = 8766


@dataclass(frozen=True, slots=True)
class TrainWork:
    """What is to be trained. micro_batch_size: rows of `length` tokens that one device passes forward at once."""

    size: ModelSize
    tokens: float
    length: int = 2048
    micro_batch_size: int = 1
    method: Method = "full"
    rank: int = 16


@dataclass(frozen=True, slots=True)
class Layout:
    """shards: devices over which weights, gradients and optimizer are spread; 1 means each has all of it.

    offload: weights, gradients and optimizer lie in main memory, and each layer visits the device
    tensor_parallel: devices that share the layer at work, which this program leaves to others; 1 means none
    """

    shards: int
    checkpointing: bool
    offload: bool = False
    tensor_parallel: int = 1

    def __str__(self) -> str:
        words = [f"FSDP over {self.shards} devices" if self.shards > 1 else "a copy on each device"]
        words += ["gradient checkpointing"] if self.checkpointing else []
        words += ["weights and optimizer in main memory"] if self.offload else []
        words += [f"each layer on {self.tensor_parallel} devices together"] if self.tensor_parallel > 1 else []
        return ", ".join(words)

    def flags(self) -> str:
        flags = ["--sharding fsdp"] if self.shards > 1 or self.offload else []
        flags += ["--cpu-offload"] if self.offload else []
        return " ".join([*flags, *(["--gradient-checkpointing"] if self.checkpointing else [])])


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes on the fullest device. main_memory: bytes of a device's share that lie in its machine's memory instead."""

    weights: float
    gradients: float
    optimizer: float
    compute_copy: float
    activations: float
    backward: float
    main_memory: float = 0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.compute_copy + self.activations + self.backward


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """fits:           `memory.total` is within the device
    smallest_fleet:  devices from which on sharding with checkpointing fits; None if no number of them helps
    tensor_parallel: devices that should share every layer, to fit or for the network to keep up; 1: sharding is enough
    seconds:         with that; compute and network overlap, and the slower one decides
    """

    work: TrainWork
    fleet: Fleet
    layout: Layout
    memory: DeviceMemory
    usable_bytes: float
    smallest_fleet: int | None
    mfu: float
    operations: float
    compute_seconds: float
    network_seconds: float
    tensor_parallel: int
    dollars_per_hour: float

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.usable_bytes

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.network_seconds / self.tensor_parallel)

    @property
    def dollars(self) -> float:
        return self.seconds / 3600 * self.fleet.count * self.dollars_per_hour


@dataclass(frozen=True, slots=True)
class ServePlan:
    """tensor_parallel: devices that hold one copy together, each a share of every layer. Speeds are upper bounds."""

    size: ModelSize
    fleet: Fleet
    bits: WeightBits
    length: int
    sequences: int
    weight_bytes: float
    kv_bytes: float
    usable_bytes: float
    tensor_parallel: int
    copies: int
    tokens_per_second_alone: float
    tokens_per_second: float
    dollars_per_hour: float

    @property
    def fits(self) -> bool:
        return self.copies > 0

    @property
    def dollars_per_year(self) -> float:
        """Of one copy."""
        return self.tensor_parallel * self.dollars_per_hour * HOURS_A_YEAR

    @property
    def dollars_per_million_tokens(self) -> float:
        """With `sequences` answers at a time, all the time."""
        return self.tensor_parallel * self.dollars_per_hour / 3600 / self.tokens_per_second * 1e6


def plan_train(work: TrainWork, fleet: Fleet, *, mfu: float | None = None, price: float | None = None) -> TrainPlan:
    """The fastest layout that fits, else the one that needs least. mfu and price: default is the device's."""
    usable = USABLE_MEMORY * fleet.device.memory_bytes
    layouts = list(_layouts(fleet))
    fitting = (layout for layout in layouts if device_memory(work, fleet, layout).total <= usable)
    layout = next(fitting, layouts[-1])
    mfu = fleet.device.mfu if mfu is None else mfu
    operations = work.tokens * formulas.operations_per_token(work.size, work.length, work.method)
    seconds = formulas.training_seconds(operations, fleet.count, fleet.device.operations, mfu)
    network = _network_seconds(work, fleet)
    return TrainPlan(
        work=work,
        fleet=fleet,
        layout=layout,
        memory=device_memory(work, fleet, layout),
        usable_bytes=usable,
        smallest_fleet=_smallest_fleet(work, fleet, usable),
        mfu=mfu,
        operations=operations,
        compute_seconds=seconds,
        network_seconds=network,
        tensor_parallel=max(layout.tensor_parallel, _tensor_parallel(network / seconds, fleet)),
        dollars_per_hour=fleet.device.dollars_per_hour if price is None else price,
    )


def device_memory(work: TrainWork, fleet: Fleet, layout: Layout) -> DeviceMemory:
    size, tokens, compute_bytes = work.size, work.micro_batch_size * work.length, fleet.device.compute_bytes
    state = [
        formulas.weight_bytes(size, work.method, work.rank, compute_bytes=compute_bytes) / layout.shards,
        formulas.gradient_bytes(size, work.method, work.rank) / layout.shards,
        formulas.optimizer_bytes(size, work.method, work.rank) / layout.shards,
    ]
    on_device = [0.0, 0.0, 0.0] if layout.offload else state
    compute_copy = formulas.compute_copy_bytes(
        size, work.method, compute_bytes=compute_bytes, is_sharded=layout.shards > 1 or layout.offload
    )
    return DeviceMemory(
        *on_device,
        compute_copy=compute_copy / layout.tensor_parallel,
        activations=formulas.activation_bytes(
            size, tokens, compute_bytes=compute_bytes, checkpointing=layout.checkpointing
        ),
        backward=formulas.backward_bytes(size, tokens, compute_bytes=compute_bytes, checkpointing=layout.checkpointing),
        main_memory=sum(state) if layout.offload else 0,
    )


def plan_serve(
    size: ModelSize,
    fleet: Fleet,
    *,
    bits: WeightBits,
    length: int,
    sequences: int,
    price: float | None = None,
) -> ServePlan:
    """One copy with `sequences` conversations of `length` tokens, on as few devices as hold it, in powers of two."""
    usable = USABLE_MEMORY * fleet.device.memory_bytes
    weights = formulas.served_weight_bytes(size, bits)
    kv = float(sequences * length * formulas.kv_bytes_per_token(size))
    # Heads are dealt out evenly, so a power of two, and whole machines beyond that.
    degree = 2 ** math.ceil(math.log2(max(1.0, (weights + kv) / usable)))
    bandwidth = fleet.device.bandwidth
    alone = formulas.decode_step_seconds(weights + kv / sequences, degree, bandwidth, BANDWIDTH_SHARE)
    together = formulas.decode_step_seconds(weights + kv, degree, bandwidth, BANDWIDTH_SHARE)
    return ServePlan(
        size=size,
        fleet=fleet,
        bits=bits,
        length=length,
        sequences=sequences,
        weight_bytes=weights,
        kv_bytes=kv,
        usable_bytes=usable,
        tensor_parallel=degree,
        copies=fleet.count // degree,
        tokens_per_second_alone=1 / alone,
        tokens_per_second=sequences / together,
        dollars_per_hour=fleet.device.dollars_per_hour if price is None else price,
    )


def _network_seconds(work: TrainWork, fleet: Fleet) -> float:
    if fleet.count == 1:
        return 0
    sent = formulas.traffic_bytes(work.size, work.method, compute_bytes=fleet.device.compute_bytes)
    tokens_of_pass = fleet.count * work.micro_batch_size * work.length
    return formulas.network_seconds(work.tokens, tokens_of_pass, sent, fleet.bandwidth_between)


def _tensor_parallel(network_share: float, fleet: Fleet) -> int:
    """Devices of one machine that share each layer, in powers of two: each then gathers that much less of it."""
    if fleet.count <= fleet.device.per_machine:
        return 1
    return min(2 ** math.ceil(math.log2(max(1.0, network_share))), fleet.device.per_machine)


def _layouts(fleet: Fleet) -> Iterator[Layout]:
    """From the fastest to the one that needs least memory."""
    for shards in sorted({1, fleet.count}):
        for checkpointing in (False, True):
            yield Layout(shards, checkpointing)
    if fleet.count > fleet.device.per_machine:
        for power in range(1, fleet.device.per_machine.bit_length()):
            yield Layout(fleet.count, checkpointing=True, tensor_parallel=2**power)
    yield Layout(fleet.count, checkpointing=True, offload=True)


def _smallest_fleet(work: TrainWork, fleet: Fleet, usable: float) -> int | None:
    """Devices from which on sharding with checkpointing fits without main memory. None if more of them do not help."""
    one = device_memory(work, fleet, Layout(1, checkpointing=True))
    if one.total <= usable:
        return 1
    many = device_memory(work, replace(fleet, count=2), Layout(2, checkpointing=True))
    state = 2 * (many.weights + many.gradients + many.optimizer)
    room = usable - (many.compute_copy + many.activations + many.backward)
    return max(2, math.ceil(state / room)) if room > 0 else None
