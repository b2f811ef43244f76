"""What a quantisation run will take of memory, disk and time, worked out beforehand from the model's sizes.

Pure apart from `this_machine`, which asks the system and times three small products. The figures follow the code they
describe: a change of what is held at once in the walk (`quant.quantize_model`), in GPTQ (`quant.gptq`) or in measuring
(`quant.measure`) belongs here too. `benchmarks/quantize_memory.py` holds plan and peak side by side.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import nn

from quant.ends import choose_ends
from quant.errors import QuantizationError
from quant.gptq import RANGE_SHRINKAGES, ActOrder
from quant.layer_source import LayerSource
from quant.layer_walk import settle_group_size
from quant.measure import BATCH_WINDOWS
from quant.options import LinearChoice, QuantizeOptions
from quant.output_parts import MOST_WEIGHTS
from quant.quantize_model import fast_product_dtype

# Python, torch and the code of its operators, before anything of a model is read.
PROCESS_BYTES: Final = 420 * 10**6
# Settling a part of a matrix holds weights, codes, steps and slopes of it.
SETTLING_COPIES: Final = 8
# Logits of a window and what comparing two of them makes of it.
LOGIT_COPIES: Final = 5
# A share kept free for everything that is not foreseen.
MEMORY_RESERVE: Final = 0.05
_RATE_SECONDS: Final = 0.05
GIGABYTE: Final = 10**9


@dataclass(frozen=True, slots=True)
class LinearSize:
    """`reads`: the names of linears with the same value share their input."""

    outputs: int
    inputs: int
    reads: str

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Of the source. Bytes as they are stored.

    linears:     of one layer, by name such as `mlp.down_proj`; all layers are alike
    layer_bytes: of the largest layer
    end_bytes:   of embeddings, final norm and head; `head_bytes` of the table that makes logits
    is_tied:     whether the embeddings are that table
    """

    num_layers: int
    hidden: int
    vocab: int
    linears: Mapping[str, LinearSize]
    layer_bytes: int
    end_bytes: int
    head_bytes: int
    is_tied: bool = True

    @property
    def layer_weights(self) -> int:
        return sum(linear.weights for linear in self.linears.values())

    @property
    def source_bytes(self) -> int:
        return self.num_layers * self.layer_bytes + self.end_bytes

    @property
    def joined(self) -> Mapping[str, LinearSize]:
        """Linears that share an input, as the one matrix that they are quantised as."""
        groups: dict[str, LinearSize] = {}
        for linear in self.linears.values():
            before = groups.get(linear.reads)
            outputs = linear.outputs + (0 if before is None else before.outputs)
            groups[linear.reads] = replace(linear, outputs=outputs)
        return groups


@dataclass(frozen=True, slots=True)
class Rates:
    """Of this machine, all threads together, per second: multiply-adds count twice."""

    fast_flops: float
    float32_flops: float
    step_bytes: float
    operation_seconds: float


@dataclass(frozen=True, slots=True)
class Machine:
    """`free_disk_bytes`: where the result goes."""

    free_memory_bytes: int
    free_disk_bytes: int
    threads: int
    rates: Rates


@dataclass(frozen=True, slots=True)
class Part:
    """One line of a plan; `amount` in bytes or seconds."""

    name: str
    amount: float


@dataclass(frozen=True, slots=True)
class Plan:
    """memory: what each phase needs at its fullest, the process itself included; the peak is the largest of them."""

    memory: tuple[Part, ...]
    disk: tuple[Part, ...]
    time: tuple[Part, ...]
    measures_serving: bool

    @property
    def peak_memory_bytes(self) -> int:
        return round(max(part.amount for part in self.memory))

    @property
    def disk_bytes(self) -> int:
        return round(sum(part.amount for part in self.disk))

    @property
    def seconds(self) -> float:
        return sum(part.amount for part in self.time)

    @property
    def lines(self) -> tuple[str, ...]:
        """For a terminal."""
        minutes = "; ".join(f"{part.name} {_duration(part.amount)}" for part in self.time)
        memory = "; ".join(f"{part.name} {_size(part.amount)}" for part in self.memory)
        disk = "; ".join(f"{part.name} {_size(part.amount)}" for part in self.disk)
        lines = [
            f"peak memory about {_size(self.peak_memory_bytes)} ({memory})",
            f"disk about {_size(self.disk_bytes)} ({disk})",
            f"time about {_duration(self.seconds)} ({minutes}), within a factor of 1.5 on an idle machine",
        ]
        if not self.measures_serving:
            lines.append("the path that serves is not measured: it holds the whole result in memory")
        return tuple(lines)


def make_plan(sizes: ModelSizes, options: QuantizeOptions, machine: Machine) -> Plan:
    phases = (_quantize_memory(sizes, options, machine.threads), _measure_memory(sizes, options))
    serving = Part("measuring as served", _serving_memory(sizes))
    measures_serving = options.measures_serving
    if measures_serving is None:
        measures_serving = serving.amount <= memory_bound(sizes, options)
    return Plan(
        memory=(*phases, serving) if measures_serving else phases,
        disk=(Part("work", _packed_bytes(sizes, options)), Part("result", _result_bytes(sizes, options))),
        time=(
            Part("quantising", _quantize_seconds(sizes, options, machine)),
            Part("measuring", _measure_seconds(sizes, options, machine.rates)),
        ),
        measures_serving=measures_serving,
    )


def memory_bound(sizes: ModelSizes, options: QuantizeOptions) -> float:
    """What the peak is kept below: 1.5 x (largest layer + its Hessians + activations) + 1 GB."""
    hessians = 4 * sum(inputs**2 for inputs in {linear.inputs for linear in sizes.linears.values()})
    return 1.5 * (sizes.layer_bytes + hessians + _activation_bytes(sizes, options)) + GIGABYTE


def refuse_if_too_large(sizes: ModelSizes, options: QuantizeOptions, machine: Machine) -> Plan:
    """The plan. Raises QuantizationError where memory or disk are too small, saying what would fit."""
    plan = make_plan(sizes, options, machine)
    memory = machine.free_memory_bytes * (1 - MEMORY_RESERVE)
    if plan.peak_memory_bytes > memory:
        raise QuantizationError(
            f"quantising would take {_size(plan.peak_memory_bytes)} of memory, {_size(memory)} are free; "
            f"{_what_fits(sizes, options, machine)}"
        )
    if plan.disk_bytes > machine.free_disk_bytes:
        raise QuantizationError(
            f"the result and the work on it take {_size(plan.disk_bytes)} of disk, {_size(machine.free_disk_bytes)} "
            "are free there; give an OUT on another disk, or free some space"
        )
    return plan


def _what_fits(sizes: ModelSizes, options: QuantizeOptions, machine: Machine) -> str:
    memory = machine.free_memory_bytes * (1 - MEMORY_RESERVE)
    for samples in (options.samples * share // 8 for share in range(7, 0, -1)):
        fewer = replace(options, samples=samples)
        if samples and make_plan(sizes, fewer, machine).peak_memory_bytes <= memory:
            return f"--samples {samples} would fit"
    shorter = replace(options, samples=max(1, options.samples // 8), seq_len=max(1, options.seq_len // 2))
    if make_plan(sizes, shorter, machine).peak_memory_bytes <= memory:
        return f"--samples {shorter.samples} --seq-len {shorter.seq_len} would fit"
    least = make_plan(sizes, replace(options, samples=1, seq_len=1), machine).peak_memory_bytes
    return f"even without calibration text it would take {_size(least)}: close other programs, or use a larger machine"


def plan_run(source: LayerSource, options: QuantizeOptions, out: Path) -> Plan:
    """For the terminal, before a run: on this machine, its speed measured. Raises QuantizationError where the group
    size does not divide every linear's inputs."""
    return make_plan(sizes_of(source), _settled(source, options), this_machine(out))


def require_room(source: LayerSource, options: QuantizeOptions, out: Path) -> Plan:
    """`refuse_if_too_large` on this machine; its speed is not measured, so the plan's time means nothing."""
    machine = this_machine(out, rates=Rates(1.0, 1.0, 1.0, 1.0))
    return refuse_if_too_large(sizes_of(source), _settled(source, options), machine)


def _settled(source: LayerSource, options: QuantizeOptions) -> QuantizeOptions:
    settled = replace(options, gptq=settle_group_size(source, options.gptq))
    choose_ends(source, settled)  # refuses what cannot be
    return settled


def sizes_of(source: LayerSource) -> ModelSizes:
    linears: dict[str, LinearSize] = {}
    outline = source.outline()
    shares_norm = getattr(outline, "post_attention_layernorm", None) is None
    for name, module in outline.named_modules():
        if isinstance(module, nn.Linear):
            linears[name] = LinearSize(module.out_features, module.in_features, _reads(name, shares_norm=shares_norm))
    return ModelSizes(
        num_layers=source.num_layers,
        hidden=source.hidden_size,
        vocab=source.vocab_size,
        linears=linears,
        layer_bytes=max(source.layer_bytes(index) for index in range(source.num_layers)),
        end_bytes=source.end_bytes(),
        head_bytes=source.head_bytes,
        is_tied=source.is_tied,
    )


def _reads(name: str, *, shares_norm: bool) -> str:
    if name.endswith(("o_proj", "down_proj")):
        return name
    return "attention input" if shares_norm or name.startswith("self_attn") else "feed-forward input"


def this_machine(out: Path, *, rates: Rates | None = None) -> Machine:
    """Takes a fifth of a second to measure rates if none are given. `out` need not exist."""
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    return Machine(
        free_memory_bytes=free_memory_bytes(),
        free_disk_bytes=shutil.disk_usage(existing).free,
        threads=torch.get_num_threads(),
        rates=rates or measure_rates(time.perf_counter),
    )


def free_memory_bytes() -> int:
    """What the system could give to this process now, by its own account; all of its memory where it keeps none."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure_rates(clock: Callable[[], float]) -> Rates:
    rows, fast = torch.ones((1024, 1024)), fast_product_dtype()
    low, step, small = rows.to(fast), torch.ones((512, 512)), torch.ones(16)
    threads = torch.get_num_threads()
    product = 2.0 * rows.shape[0] ** 3
    step_bytes = 2.0 * step.numel() * step.element_size()
    return Rates(
        fast_flops=product / _seconds_each(lambda: low @ low, clock),
        float32_flops=product / _seconds_each(lambda: rows @ rows, clock),
        step_bytes=threads * step_bytes / _seconds_each(lambda: step.mul_(1.0), clock),
        operation_seconds=_seconds_each(lambda: small.mul_(1.0), clock),
    )


def _seconds_each(work: Callable[[], object], clock: Callable[[], float]) -> float:
    work()
    started, rounds = clock(), 0
    while True:
        work()
        rounds += 1
        elapsed = clock() - started
        if elapsed >= _RATE_SECONDS:
            return elapsed / rounds


def _activation_bytes(sizes: ModelSizes, options: QuantizeOptions) -> int:
    """Calibration in bf16 at the entrance of a layer, and at its widest place."""
    widest = max(linear.inputs for linear in sizes.linears.values())
    return fast_product_dtype().itemsize * options.samples * options.seq_len * (sizes.hidden + widest)


def _quantize_memory(sizes: ModelSizes, options: QuantizeOptions, threads: int) -> Part:
    """At the matrix for which it is most: the layer, whose weights give way to codes; a Hessian with two more of its
    size while it is inverted; the matrix in float32 as it was and with its inputs first; the parts being settled."""
    copies = 3 if options.gptq.act_order is ActOrder.NONE else 4
    at_work = 0
    for linear in sizes.joined.values():
        settling = threads * SETTLING_COPIES * 4 * min(linear.weights // threads, MOST_WEIGHTS)
        at_work = max(at_work, copies * 4 * linear.inputs**2 + (2 * 4 + 3) * linear.weights + settling)
    extra_activations = fast_product_dtype().itemsize * options.samples * options.seq_len * sizes.hidden
    activations = _activation_bytes(sizes, options) + extra_activations
    # A table of the vocabulary takes a byte a code, and at a time as many weights as a linear.
    codes = sizes.vocab * sizes.hidden if _end_bytes(sizes, options) else 0
    return Part("quantising", PROCESS_BYTES + max(sizes.layer_bytes, codes) + at_work + activations)


def _held_out_tokens(options: QuantizeOptions) -> int:
    from quant.texts import HELD_OUT_TOKENS

    return HELD_OUT_TOKENS * (2 if options.measures_prose else 1)


def _measure_memory(sizes: ModelSizes, options: QuantizeOptions) -> Part:
    """Three models' hidden states, and either a layer in float32 with its activations or two heads with logits."""
    from quant.texts import HELD_OUT_SEQ_LEN

    states = 3 * 4 * _held_out_tokens(options) * sizes.hidden
    widest = max(linear.inputs for linear in sizes.linears.values())
    batch = 4 * 4 * BATCH_WINDOWS * HELD_OUT_SEQ_LEN * widest
    rounding = 5 * 4 * max(linear.weights for linear in sizes.linears.values())
    layer = 4 * sizes.layer_weights + sizes.layer_bytes + max(batch, rounding)
    rounded = len(_end_bytes(sizes, options)) * sizes.vocab * sizes.hidden
    logits = 2 * sizes.head_bytes + rounded + LOGIT_COPIES * 4 * HELD_OUT_SEQ_LEN * sizes.vocab
    return Part("measuring", PROCESS_BYTES + states + max(layer, logits))


def _serving_memory(sizes: ModelSizes) -> float:
    """The engine reads all codes, one byte each, and lays them out anew; the table of the vocabulary it has twice."""
    return PROCESS_BYTES + 1.7 * sizes.num_layers * sizes.layer_weights + 3 * sizes.end_bytes


def _packed_bytes(sizes: ModelSizes, options: QuantizeOptions) -> int:
    choices = ((linear, options.choice_of(f"model.layers.0.{name}")) for name, linear in sizes.linears.items())
    layer = sum(_packed_linear_bytes(linear.outputs, linear.inputs, choice) for linear, choice in choices)
    return sizes.num_layers * layer + sum(_end_bytes(sizes, options))


def _packed_linear_bytes(outputs: int, inputs: int, choice: LinearChoice) -> int:
    size = choice.group_size or 32
    groups = 1 if size < 1 else inputs // size
    return outputs * inputs * choice.bits // 8 + groups * outputs * (2 + 1) + 4 * inputs


def _end_bytes(sizes: ModelSizes, options: QuantizeOptions) -> list[int]:
    """Of each table of the vocabulary that is quantised, packed."""
    bits = [options.head_bits, options.embedding_bits]
    if sizes.is_tied:
        bits = [options.head_bits or options.embedding_bits]
    choices = [LinearChoice(width, options.gptq.group_size) for width in bits if width is not None]
    return [_packed_linear_bytes(sizes.vocab, sizes.hidden, choice) for choice in choices]


def _result_bytes(sizes: ModelSizes, options: QuantizeOptions) -> int:
    plain_ends = sizes.end_bytes - len(_end_bytes(sizes, options)) * sizes.head_bytes
    return _packed_bytes(sizes, options) + plain_ends


def _quantize_seconds(sizes: ModelSizes, options: QuantizeOptions, machine: Machine) -> float:
    """Of all layers, and of the tables of the vocabulary."""
    tokens = options.samples * options.seq_len
    layer = 2.0 * tokens * sizes.layer_weights / machine.rates.fast_flops
    layer += sum(_matrix_seconds(linear, options, machine.rates) for linear in sizes.joined.values())
    table = _matrix_seconds(LinearSize(sizes.vocab, sizes.hidden, "table"), options, machine.rates)
    return sizes.num_layers * layer + len(_end_bytes(sizes, options)) * table


def _matrix_seconds(linear: LinearSize, options: QuantizeOptions, rates: Rates) -> float:
    """Products over the calibration text, GPTQ's own and the refinement's, and steps from input to input, whose cost is
    in memory traffic and in the number of operations."""
    tokens = options.samples * options.seq_len
    sweeps = options.gptq.refine_sweeps
    grids = len(RANGE_SHRINKAGES) + 1 if options.gptq.range_search else 1
    square = linear.outputs * float(linear.inputs) ** 2
    products = ((9 + 2 * sweeps) * square + 2.0 * float(linear.inputs) ** 3) / rates.float32_flops
    steps = linear.weights * (180 + 56 * grids + 310 * sweeps) / rates.step_bytes
    steps += linear.inputs * (9 + 10 * sweeps + grids) * rates.operation_seconds
    return tokens * float(linear.inputs) ** 2 / rates.fast_flops + products + steps


def _measure_seconds(sizes: ModelSizes, options: QuantizeOptions, rates: Rates) -> float:
    tokens = _held_out_tokens(options)
    layers = 3 * 2.0 * tokens * sizes.num_layers * sizes.layer_weights
    heads = 4 * 2.0 * tokens * sizes.vocab * sizes.hidden
    comparing = 12 * 8.0 * tokens * sizes.vocab / rates.step_bytes
    rounding = sizes.num_layers * sizes.layer_weights * 56 * len(RANGE_SHRINKAGES) / rates.step_bytes
    serving = 2.0 * tokens * sizes.num_layers * sizes.layer_weights / rates.fast_flops
    return (layers + heads) / rates.float32_flops + comparing + rounding + serving


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= GIGABYTE else f"{count / 1e6:,.0f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:,.0f} min" if seconds >= 100 else f"{max(seconds, 1):.0f} s"
