"""`causerie plan train|serve|sizes|devices`: settings in, a plan on standard output."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import cast

import msgspec
from rich.console import Console
from rich.table import Table

from quant.model_directory import JsonValue
from training.errors import TrainingError
from training.options import read_settings
from training.plan.devices import DEVICES, GIB, PRICES_AS_OF, parse_fleet
from training.plan.formulas import WeightBits
from training.plan.planner import ServePlan, TrainPlan, TrainWork, plan_serve, plan_train
from training.settings import PlanServeSettings, PlanTrainSettings
from training.sizes import SIZES, find_size

__all__ = ["count_tokens", "plan"]

USAGE = """\
usage: causerie plan train|serve|sizes|devices [options]

  train    memory of each device, a sharding that fits, time and cost of training
  serve    memory, devices that share a model, speed at best and cost of serving
  sizes    models that have a name
  devices  devices that have a name

"""
EXAMPLES = """\
examples:
  causerie plan train --model palm-540b --gpus 512xh100 --tokens 780b
  causerie plan train --model llama-7b --gpus 1x4090 --tokens 20m --method qlora
  causerie plan serve --model bloom-176b --gpus 8xa100-80 --bits 16

Time assumes a share of the devices' peak (--mfu), cost a price (--price); both are printed with the plan.
"""
DAY_S = 86_400
_SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def plan(argv: Sequence[str]) -> int:
    """Returns 1 if what was planned does not fit. Raises TrainingError with one line."""
    match argv[:1]:
        case ["train"]:
            return _plan_train(argv[1:])
        case ["serve"]:
            return _plan_serve(argv[1:])
        case ["sizes"] | ["devices"]:
            Console().print(_size_table() if argv[0] == "sizes" else _device_table())
            return 0
        case ["-h"] | ["--help"]:
            print(USAGE + EXAMPLES, end="")
            return 0
        case _:
            print(USAGE + EXAMPLES, end="", file=sys.stderr)
            return 2


def count_tokens(text: str) -> float:
    """'780b', '1.5e9', '20m'. Raises TrainingError."""
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([kmbt]?)", text.strip().lower().replace(",", "").replace("_", ""))
    try:
        count = float(found[1]) * _SUFFIXES[found[2]] if found else 0.0
    except ValueError:
        count = 0.0
    if count <= 0:
        raise TrainingError(f"--tokens {text!r} is no number of tokens; expected one as in 780b, 20m or 1.5e9")
    return count


def _plan_train(argv: Sequence[str]) -> int:
    description = " ".join((PlanTrainSettings.__doc__ or "").split())
    settings = read_settings(PlanTrainSettings, "plan train", argv, description=description, examples=EXAMPLES)
    work = TrainWork(
        find_size(settings.model),
        count_tokens(settings.tokens),
        length=settings.length,
        micro_batch_size=settings.micro_batch_size,
        method=settings.method,
        rank=settings.lora_rank,
    )
    made = plan_train(work, parse_fleet(settings.gpus), mfu=settings.mfu, price=settings.price)
    if settings.json:
        print(json.dumps(_train_record(made)))
    else:
        _print_train(made)
    return 0 if made.fits else 1


def _plan_serve(argv: Sequence[str]) -> int:
    description = " ".join((PlanServeSettings.__doc__ or "").split())
    settings = read_settings(PlanServeSettings, "plan serve", argv, description=description, examples=EXAMPLES)
    made = plan_serve(
        find_size(settings.model),
        parse_fleet(settings.gpus),
        bits=cast("WeightBits", int(settings.bits)),
        length=settings.length,
        sequences=settings.sequences,
        price=settings.price,
    )
    if settings.json:
        print(json.dumps(_serve_record(made)))
    else:
        _print_serve(made)
    return 0 if made.fits else 1


def _print_train(made: TrainPlan) -> None:
    console, work, memory = Console(), made.work, made.memory
    console.print(f"{work.size.name}: {_count(work.size.parameters)} parameters, {_count(work.tokens)} tokens")
    table = Table("on each device", "GiB")
    for name in ("weights", "gradients", "optimizer", "compute_copy", "activations", "backward"):
        table.add_row(name.replace("_", " "), _gib(getattr(memory, name)))
    table.add_row("together", _gib(memory.total), style="bold")
    table.add_row(f"usable of {made.fleet.device.name}", _gib(made.usable_bytes))
    if memory.main_memory:
        table.add_row("in main memory instead", _gib(memory.main_memory))
    console.print(table)
    console.print(f"layout: {made.layout}" + ("" if made.fits else "; it does NOT fit"))
    if made.layout.flags():
        console.print(f"flags: {made.layout.flags()}")
    for line in _train_advice(made):
        console.print(line)
    console.print(
        f"time: {_duration(made.seconds)} on {made.fleet} at {made.mfu:.0%} of their peak; "
        f"cost: {_dollars(made.dollars)} at ${made.dollars_per_hour:.2f} an hour each (prices of {PRICES_AS_OF})"
    )


def _train_advice(made: TrainPlan) -> list[str]:
    advice: list[str] = []
    if not made.fits:
        fleet = made.smallest_fleet
        cure = f"from {fleet} devices on it fits" if fleet else "take a device with more memory, or shorter rows"
        advice.append(f"advice: {cure}" if fleet != made.fleet.count else "advice: lower --micro-batch-size")
    if made.tensor_parallel > 1:
        alone = f"takes {_duration(made.network_seconds)} of network time"
        reason = "does not fit" if made.layout.tensor_parallel > 1 else alone
        advice.append(
            f"advice: sharding alone {reason}; time and cost are with {made.tensor_parallel} devices of a machine "
            "sharing each layer (tensor parallelism, which Megatron-LM or torchtitan do and this program does not)"
        )
    elif made.network_seconds > made.compute_seconds:
        compute = _duration(made.compute_seconds)
        advice.append(f"advice: the link between the devices is the limit (compute takes {compute})")
    return advice


def _print_serve(made: ServePlan) -> None:
    console = Console()
    console.print(f"{made.size.name}: {_count(made.size.parameters)} parameters in {made.bits} bits")
    table = Table("one copy", "GiB")
    table.add_row("weights", _gib(made.weight_bytes))
    table.add_row(f"keys and values, {made.sequences} x {made.length:,} tokens", _gib(made.kv_bytes))
    table.add_row("together", _gib(made.weight_bytes + made.kv_bytes), style="bold")
    table.add_row(f"usable of {made.tensor_parallel} x {made.fleet.device.name}", _gib(_usable(made)))
    console.print(table)
    fits = f"{made.copies} on {made.fleet}" if made.fits else f"{made.fleet} does NOT hold one"
    console.print(f"devices of one copy: {made.tensor_parallel} (tensor parallelism if above 1); copies: {fits}")
    console.print(
        f"at best {made.tokens_per_second_alone:,.0f} tokens/s for one conversation, "
        f"{made.tokens_per_second:,.0f} for {made.sequences} together"
    )
    console.print(
        f"cost of one copy: {_dollars(made.dollars_per_year)} a year, ${made.dollars_per_million_tokens:.2f} a million "
        f"tokens, at ${made.dollars_per_hour:.2f} an hour each (prices of {PRICES_AS_OF})"
    )


def _train_record(made: TrainPlan) -> dict[str, JsonValue]:
    record: dict[str, JsonValue] = msgspec.to_builtins(made)
    derived: dict[str, JsonValue] = {
        "fits": made.fits,
        "parameters": made.work.size.parameters,
        "total_bytes": made.memory.total,
        "flags": made.layout.flags(),
        "seconds": made.seconds,
        "dollars": made.dollars,
        "prices_as_of": PRICES_AS_OF,
    }
    return record | derived


def _serve_record(made: ServePlan) -> dict[str, JsonValue]:
    record: dict[str, JsonValue] = msgspec.to_builtins(made)
    derived: dict[str, JsonValue] = {
        "fits": made.fits,
        "parameters": made.size.parameters,
        "dollars_per_year": made.dollars_per_year,
        "dollars_per_million_tokens": made.dollars_per_million_tokens,
        "prices_as_of": PRICES_AS_OF,
    }
    return record | derived


def _size_table() -> Table:
    table = Table("name", "parameters", "layers", "hidden", "heads", "key/value heads", "vocabulary", "can be built")
    for size in SIZES.values():
        shape = (size.layers, size.hidden, size.heads, size.kv_heads, size.vocab)
        buildable = "yes" if size.is_buildable else "no, to plan with"
        table.add_row(size.name, _count(size.parameters), *(f"{number:,}" for number in shape), buildable)
    return table


def _device_table() -> Table:
    table = Table("name", "memory, GiB", "operations a second", "memory GB/s", "MFU", f"$ an hour, {PRICES_AS_OF}")
    for device in DEVICES.values():
        table.add_row(
            device.name,
            _gib(device.memory_bytes),
            f"{device.operations / 1e12:,.1f} T",
            f"{device.bandwidth / 1e9:,.0f}",
            f"{device.mfu:.0%}",
            f"{device.dollars_per_hour:.2f}",
        )
    return table


def _usable(made: ServePlan) -> float:
    return made.usable_bytes * made.tensor_parallel


def _gib(number: float) -> str:
    return f"{number / GIB:,.2f}"


def _count(number: float) -> str:
    for suffix, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= unit:
            return f"{number / unit:.4g} {suffix}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    for name, unit in (("days", DAY_S), ("hours", 3600), ("minutes", 60)):
        if seconds >= unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.1f} seconds"


def _dollars(dollars: float) -> str:
    return f"${dollars:,.0f}" if dollars >= 10 else f"${dollars:.2f}"
