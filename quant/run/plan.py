"""What a quantisation run will take of memory, disk and time, worked out beforehand, and whether there is room for it.

The formulas are in `quant.run.plan_costs`; what the machine has is asked by `quant.run.machine`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from quant.errors import QuantizationError
from quant.options import QuantizeOptions
from quant.run import plan_costs
from quant.run.machine import NO_RATES, Machine, this_machine
from quant.run.model_sizes import ModelSizes, sizes_of
from quant.walk.ends import choose_ends
from quant.walk.layer_source import LayerSource
from quant.walk.layer_walk import settle_group_size

# A share kept free for everything that is not foreseen.
MEMORY_RESERVE: Final = 0.05


@dataclass(frozen=True, slots=True)
class Part:
    """One line of a plan; `amount` in bytes or seconds."""

    name: str
    amount: float


@dataclass(frozen=True, slots=True)
class Plan:
    """memory: what each phase needs at its fullest, the process itself included; the peak is the largest of them.
    search_seconds: what the search for a perplexity budget adds at the most, if it is missed; None without a budget
    measures_speed: whether source and result are also decoded in an engine, each whole in memory: where that was asked
    for and needs no more than the rest may
    refusal: why this machine has no room for it and what would fit; None if it has."""

    memory: tuple[Part, ...]
    disk: tuple[Part, ...]
    time: tuple[Part, ...]
    search_seconds: float | None
    measures_speed: bool
    machine: Machine
    refusal: str | None = None

    @property
    def peak_memory_bytes(self) -> int:
        return round(max(part.amount for part in self.memory))

    @property
    def disk_bytes(self) -> int:
        return round(sum(part.amount for part in self.disk))

    @property
    def seconds(self) -> float:
        """Without a search."""
        return sum(part.amount for part in self.time)

    @property
    def lines(self) -> tuple[str, ...]:
        """For a terminal of 80 columns."""
        free_memory, free_disk = _size(self.machine.free_memory_bytes), _size(self.machine.free_disk_bytes)
        lines = [
            f"memory  about {_size(self.peak_memory_bytes)} at the peak; {free_memory} are free",
            _listed(self.memory, _size),
            f"disk    about {_size(self.disk_bytes)}; {free_disk} are free",
            _listed(self.disk, _size),
            f"time    about {_duration(self.seconds)}, within a factor of 1.5 on an idle machine",
            _listed(self.time, _duration),
        ]
        if self.search_seconds is not None:
            lines.append(f"        at most {_duration(self.search_seconds)} more if the perplexity budget is missed")
        return tuple(lines)


def make_plan(sizes: ModelSizes, options: QuantizeOptions, machine: Machine, *, merges_adapter: bool = False) -> Plan:
    """options: with their group size settled. merges_adapter: whether the source is yet to be made from a base."""
    plan = _plan(sizes, options, machine, merges_adapter=merges_adapter)
    return replace(plan, refusal=_why_no_room(plan, sizes, options))


def plan_run(source: LayerSource, options: QuantizeOptions, out: Path, *, merges_adapter: bool = False) -> Plan:
    """For the terminal, before a run: on this machine, its speed measured. Raises QuantizationError where the group
    size does not divide every linear's inputs."""
    return make_plan(sizes_of(source), _settled(source, options), this_machine(out), merges_adapter=merges_adapter)


def require_room(source: LayerSource, options: QuantizeOptions, out: Path) -> Plan:
    """The plan on this machine, whose speed is not measured: its times mean nothing.

    Raises QuantizationError where memory or disk are too small, saying what would fit.
    """
    plan = make_plan(sizes_of(source), _settled(source, options), this_machine(out, rates=NO_RATES))
    if plan.refusal is not None:
        raise QuantizationError(plan.refusal)
    return plan


def _settled(source: LayerSource, options: QuantizeOptions) -> QuantizeOptions:
    settled = replace(options, gptq=settle_group_size(source, options.gptq))
    choose_ends(source, settled)  # refuses what cannot be
    return settled


def _plan(sizes: ModelSizes, options: QuantizeOptions, machine: Machine, *, merges_adapter: bool) -> Plan:
    memory = [
        Part("quantising", plan_costs.quantize_memory(sizes, options, machine.threads)),
        Part("measuring", plan_costs.measure_memory(sizes, options)),
    ]
    room = min(plan_costs.memory_bound(sizes, options), _usable_memory(machine))
    speed = plan_costs.speed_memory(sizes, options) if options.measures_speed else None
    measures_speed = speed is not None and speed <= room
    if speed is not None and measures_speed:
        memory.append(Part("decoding", speed))
    return Plan(
        memory=tuple(memory),
        disk=_disk(sizes, options, merges_adapter=merges_adapter),
        time=_time(sizes, options, machine, measures_speed=measures_speed),
        search_seconds=_search_seconds(sizes, options, machine),
        measures_speed=measures_speed,
        machine=machine,
    )


def _disk(sizes: ModelSizes, options: QuantizeOptions, *, merges_adapter: bool) -> tuple[Part, ...]:
    """What is there at one time."""
    parts = [Part("merged model", sizes.source_bytes)] if merges_adapter else []
    work = plan_costs.packed_bytes(sizes, options) + plan_costs.waiting_bytes(sizes, options)
    parts.append(Part("work", work))
    if options.max_perplexity_increase is not None:
        parts.append(Part("search at most", plan_costs.search_bytes(sizes, options)))
    return (*parts, Part("result", plan_costs.result_bytes(sizes, options)))


def _time(sizes: ModelSizes, options: QuantizeOptions, machine: Machine, *, measures_speed: bool) -> tuple[Part, ...]:
    parts = [
        Part("quantising", plan_costs.quantize_seconds(sizes, options, machine)),
        Part("measuring", plan_costs.measure_seconds(sizes, options, machine.rates)),
        Part("texts and files", plan_costs.file_seconds(sizes, options)),
    ]
    speed = Part("decoding", plan_costs.speed_seconds(sizes, options))
    return (*parts, speed) if measures_speed else tuple(parts)


def _search_seconds(sizes: ModelSizes, options: QuantizeOptions, machine: Machine) -> float | None:
    if options.max_perplexity_increase is None:
        return None
    return plan_costs.search_seconds(sizes, options, machine)


def _why_no_room(plan: Plan, sizes: ModelSizes, options: QuantizeOptions) -> str | None:
    memory, disk = _usable_memory(plan.machine), plan.machine.free_disk_bytes
    if plan.peak_memory_bytes > memory:
        return (
            f"quantising would take {_size(plan.peak_memory_bytes)} of memory, {_size(memory)} are free; "
            f"{_what_fits(sizes, options, plan.machine)}"
        )
    if plan.disk_bytes > disk:
        return (
            f"the result and the work on it take {_size(plan.disk_bytes)} of disk, {_size(disk)} are free there; "
            "give an OUT on another disk, or free some space"
        )
    return None


def _what_fits(sizes: ModelSizes, options: QuantizeOptions, machine: Machine) -> str:
    def peak(fewer: QuantizeOptions) -> int:
        return _plan(sizes, fewer, machine, merges_adapter=False).peak_memory_bytes

    memory = _usable_memory(machine)
    for samples in (options.samples * share // 8 for share in range(7, 0, -1)):
        if samples and peak(replace(options, samples=samples)) <= memory:
            return f"--samples {samples} would fit"
    shorter = replace(options, samples=max(1, options.samples // 8), seq_len=max(1, options.seq_len // 2))
    if peak(shorter) <= memory:
        return f"--samples {shorter.samples} --seq-len {shorter.seq_len} would fit"
    least = peak(replace(options, samples=1, seq_len=1))
    return f"even without calibration text it would take {_size(least)}: close other programs, or use a larger machine"


def _usable_memory(machine: Machine) -> float:
    return machine.free_memory_bytes * (1 - MEMORY_RESERVE)


def _listed(parts: Sequence[Part], shown: Callable[[float], str]) -> str:
    return "        " + "; ".join(f"{part.name} {shown(part.amount)}" for part in parts)


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= plan_costs.GIGABYTE else f"{count / 1e6:,.0f} MB"


def _duration(seconds: float) -> str:
    if seconds >= 100 * 60:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:,.0f} min" if seconds >= 100 else f"{max(seconds, 1):.0f} s"
