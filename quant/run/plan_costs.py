"""Formulas for what each phase of a quantisation takes of memory, disk and time. Pure.

They follow the code that they describe: a change of what is held at once in the walk (`quant.walk.quantize_model`), in
GPTQ (`quant.method.gptq`) or in measuring (`quant.report.measure`, `serving.engine.layered_logits`) belongs here too.
`benchmarks/quantize_memory.py` holds plan and run side by side.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from quant.budget.search import EIGHT_BIT_SAMPLES, SearchCost, search_cost
from quant.method.gptq import ERROR_ROWS, GptqOptions
from quant.method.grids import RANGE_SHRINKAGES
from quant.method.output_parts import MOST_WEIGHTS
from quant.options import LinearChoice, QuantizeOptions
from quant.report.measure import BATCH_WINDOWS, COMPARED_ROWS
from quant.report.quantization_report import MOST_DECODED_BYTES
from quant.run.machine import Machine, Rates
from quant.run.model_sizes import MIXED, SHARED_INPUTS, WIDEST, LinearSize, ModelSizes
from quant.walk.quantize_model import fast_product_dtype

GIGABYTE: Final = 10**9
# Python, torch, the code of its operators and the tokenizer, before a weight of the model is read.
PROCESS_BYTES: Final = 420 * 10**6
# Settling a part of a matrix holds weights, errors and slopes of it.
SETTLING_COPIES: Final = 4
# What norms, attention and activations read and write of a token, in widths of what they read.
ACTIVATION_PASSES: Final = 30
# Bytes for each of the head's weights while the serving path's is packed: as stored, codes twice, packed.
HEAD_PACKING_BYTES: Final = 5.5
# An engine on plain weights has them as they are stored and as it multiplies by them.
ENGINE_COPIES: Final = 2.2
# Reading, packing or hashing weights, one thread.
FILE_BYTES_PER_SECOND: Final = 4e8
# Tokenising the calibration text and drawing the report's plot; starting a process with torch; decoding one model.
TEXT_SECONDS, START_SECONDS, DECODE_SECONDS = 5.0, 5.0, 3.0
# Logits of some rows and what comparing two of them makes of it.
LOGIT_COPIES: Final = 5


def memory_bound(sizes: ModelSizes, options: QuantizeOptions) -> float:
    """What the peak is kept below: 1.5 x (largest layer + its Hessians + activations) + 1 GB."""
    hessians = 4 * sum(inputs**2 for inputs in {linear.inputs for linear in sizes.linears.values()})
    return 1.5 * (sizes.layer_bytes + hessians + _activation_bytes(sizes, options)) + GIGABYTE


def quantize_memory(sizes: ModelSizes, options: QuantizeOptions, threads: int) -> float:
    """At the matrix for which it is most: the layer, whose weights give way to codes; what quantising the matrix holds;
    and the activations that are kept in memory then."""
    token_bytes = fast_product_dtype().itemsize * options.samples * options.seq_len
    at_work = max(
        _matrix_memory(linear, threads, is_joined=reads in SHARED_INPUTS) + token_bytes * _kept_width(sizes, reads)
        for reads, linear in sizes.joined.items()
    )
    # A table of the vocabulary takes a byte a code, and at a time as many weights as a linear.
    codes = sizes.head_weights if _packed_ends(sizes, options) else 0
    return PROCESS_BYTES + max(sizes.layer_bytes, codes) + at_work


def _matrix_memory(linear: LinearSize, threads: int, *, is_joined: bool) -> float:
    """The Hessian, beside the most of: the root of its inverse with the parts being settled and the codes of those that
    are; codes as they are put in order; errors of some outputs. And a copy of weights that were joined."""
    hessian = 4 * linear.inputs**2
    settling = threads * SETTLING_COPIES * 4 * min(linear.weights // threads, MOST_WEIGHTS)
    errors = 5 * 4 * ERROR_ROWS * linear.inputs
    largest = max(hessian + linear.weights + settling, 3 * linear.weights, linear.weights + errors)
    return hessian + largest + (2 * linear.weights if is_joined else 0)


def _kept_width(sizes: ModelSizes, reads: str) -> int:
    """Of the activations of a token that are in memory while the linears of one input are quantised: what enters the
    layer; that input, but for the widest; what attention has mixed where it is added at the end."""
    kept = sizes.hidden + (0 if reads == WIDEST else sizes.joined[reads].inputs)
    is_mixed = sizes.is_parallel and reads not in (SHARED_INPUTS[0], MIXED)
    return kept + (sizes.joined[MIXED].inputs if is_mixed else 0)


def waiting_bytes(sizes: ModelSizes, options: QuantizeOptions) -> int:
    """Of activations in a file while the linears that read a layer's widest are quantised."""
    return fast_product_dtype().itemsize * options.samples * options.seq_len * sizes.joined[WIDEST].inputs


def _activation_bytes(sizes: ModelSizes, options: QuantizeOptions) -> int:
    """Calibration in bf16 at the entrance of a layer, and at its widest place."""
    return fast_product_dtype().itemsize * options.samples * options.seq_len * (sizes.hidden + sizes.widest_input)


def measure_memory(sizes: ModelSizes, options: QuantizeOptions) -> float:
    """Three models' hidden states with a layer in float32; four with the serving path's head as it is packed, or with
    one of its layers; or all heads with logits."""
    from quant.run.texts import HELD_OUT_SEQ_LEN

    state = 4 * _held_out_tokens(options) * sizes.hidden
    batch = 4 * 4 * BATCH_WINDOWS * HELD_OUT_SEQ_LEN * sizes.widest_input
    rounding = 5 * 4 * max(linear.weights for linear in sizes.linears.values())
    plain = 3 * state + 4 * sizes.layer_weights + sizes.layer_bytes + max(batch, rounding)
    served = 4 * state + max(HEAD_PACKING_BYTES * sizes.head_weights, sizes.end_bytes + 3 * sizes.layer_weights)
    logits = LOGIT_COPIES * 4 * COMPARED_ROWS * sizes.vocab
    packed = len(_packed_ends(sizes, options))
    heads = (2 if packed else 1) * sizes.head_bytes + (2 + packed) * sizes.head_weights
    comparing = 3.5 * state + heads + logits
    return PROCESS_BYTES + max(plain, served, comparing)


def speed_memory(sizes: ModelSizes, options: QuantizeOptions) -> float | None:
    """Of a process of its own, which has the source in an engine and then the result, beside this one. None where both
    are too large for it."""
    engines: list[float] = []
    if sizes.source_bytes <= MOST_DECODED_BYTES:
        engines.append(ENGINE_COPIES * sizes.source_bytes)
    if result_bytes(sizes, options) <= MOST_DECODED_BYTES:
        engines.append(1.7 * sizes.num_layers * sizes.layer_weights + 3 * sizes.end_bytes)
    return 2 * PROCESS_BYTES + max(engines) if engines else None


def packed_bytes(sizes: ModelSizes, options: QuantizeOptions) -> int:
    """Of everything that is quantised, as it is written."""
    choices = ((linear, options.choice_of(f"model.layers.0.{name}")) for name, linear in sizes.linears.items())
    layer = sum(_packed_linear_bytes(linear.outputs, linear.inputs, choice) for linear, choice in choices)
    return sizes.num_layers * layer + sum(_packed_ends(sizes, options))


def _packed_linear_bytes(outputs: int, inputs: int, choice: LinearChoice) -> int:
    size = choice.group_size or 32
    groups = 1 if size < 1 else inputs // size
    return outputs * inputs * choice.bits // 8 + groups * outputs * (2 + 1) + 4 * inputs


def _packed_ends(sizes: ModelSizes, options: QuantizeOptions) -> list[int]:
    """Bytes of each table of the vocabulary that is quantised, packed."""
    bits = [options.head_bits, options.embedding_bits]
    if sizes.is_tied:
        bits = [options.head_bits or options.embedding_bits]
    choices = [LinearChoice(width, options.gptq.group_size) for width in bits if width is not None]
    return [_packed_linear_bytes(sizes.vocab, sizes.hidden, choice) for choice in choices]


def result_bytes(sizes: ModelSizes, options: QuantizeOptions) -> int:
    plain_ends = sizes.end_bytes - len(_packed_ends(sizes, options)) * sizes.head_bytes
    return packed_bytes(sizes, options) + plain_ends


def search_bytes(sizes: ModelSizes, options: QuantizeOptions) -> int:
    """At the most: of the walks and the mixture that lie beside the first walk."""
    return sum(packed_bytes(sizes, stored) for stored in _search_cost(sizes, options).on_disk)


def _search_cost(sizes: ModelSizes, options: QuantizeOptions) -> SearchCost:
    return search_cost(options, [linear.inputs for linear in sizes.linears.values()])


def quantize_seconds(sizes: ModelSizes, options: QuantizeOptions, machine: Machine) -> float:
    """Of all layers, and of the tables of the vocabulary."""
    tokens, rates = options.samples * options.seq_len, machine.rates
    layer = 2.0 * tokens * sizes.layer_weights / rates.fast_flops
    layer += ACTIVATION_PASSES * tokens * (sizes.hidden + sizes.widest_input) * 4 / rates.step_bytes
    layer += sum(_matrix_seconds(linear, options, machine) for linear in sizes.joined.values())
    table = _matrix_seconds(LinearSize(sizes.vocab, sizes.hidden, "table"), options, machine)
    return sizes.num_layers * layer + len(_packed_ends(sizes, options)) * table


def _matrix_seconds(linear: LinearSize, options: QuantizeOptions, machine: Machine) -> float:
    """Products over the calibration text, GPTQ's own and the refinement's, and steps from input to input."""
    inputs, rates = float(linear.inputs), machine.rates
    hessian = options.samples * options.seq_len * inputs**2 / rates.fast_flops
    products = (5 + 2 * options.gptq.refine_sweeps) * linear.outputs * inputs**2 + 2.0 * inputs**3
    return hessian + products / rates.float32_flops + _step_seconds(linear, options.gptq, machine)


def _step_seconds(linear: LinearSize, options: GptqOptions, machine: Machine) -> float:
    """Of one matrix. In C they are arithmetic, at a third of a product's speed; in torch memory traffic, and the number
    of operations."""
    sweeps, rates = options.refine_sweeps, machine.rates
    grids = len(RANGE_SHRINKAGES) + 1 if options.range_search else 1
    if machine.has_native_steps:
        group = linear.inputs if options.group_size in (None, -1) else options.group_size
        return 2.0 * linear.weights * (6 * grids + group * (1.5 + 3 * sweeps)) / (rates.float32_flops / 3)
    traffic = linear.weights * (180 + 56 * grids + 310 * sweeps) / rates.step_bytes
    return traffic + linear.inputs * (9 + 10 * sweeps + grids) * rates.operation_seconds


def measure_seconds(sizes: ModelSizes, options: QuantizeOptions, rates: Rates) -> float:
    """Three models in float32, one of them rounded first, and one as it serves, over the held-out text."""
    tokens = _held_out_tokens(options)
    weights = sizes.num_layers * sizes.layer_weights
    carrying = (3 * trial_seconds(sizes, options, rates)) + 2.0 * tokens * weights / rates.fast_flops
    heads = 4 * 2.0 * tokens * sizes.head_weights / rates.float32_flops
    comparing = 12 * 8.0 * tokens * sizes.vocab / rates.step_bytes
    rounding = weights * 56 * len(RANGE_SHRINKAGES) / rates.step_bytes
    return carrying + heads + comparing + rounding


def trial_seconds(sizes: ModelSizes, options: QuantizeOptions, rates: Rates) -> float:
    """One model in float32 over the held-out text, up to its head."""
    return 2.0 * _held_out_tokens(options) * sizes.num_layers * sizes.layer_weights / rates.float32_flops


def search_seconds(sizes: ModelSizes, options: QuantizeOptions, machine: Machine) -> float:
    """At the most. Harm is measured one pass of a few tokens for each of a layer's four units, through half the layers
    on average."""
    cost, rates = _search_cost(sizes, options), machine.rates
    short = replace(options, samples=EIGHT_BIT_SAMPLES, gptq=replace(options.gptq, bits=8, refine_sweeps=0))
    walks = cost.walks * quantize_seconds(sizes, options, machine)
    short_walks = cost.short_walks * quantize_seconds(sizes, short, machine)
    through_half = sizes.num_layers * sizes.layer_weights / 2 + sizes.head_weights
    harm = 4 * sizes.num_layers * 2.0 * cost.harm_tokens * through_half / rates.float32_flops
    trials = cost.trials * trial_seconds(sizes, options, rates)
    return walks + short_walks + harm + trials + cost.results * measure_seconds(sizes, options, rates)


def file_seconds(sizes: ModelSizes, options: QuantizeOptions) -> float:
    """Tokenising the texts, hashing the source, writing the result and reading it back, drawing the report's plot."""
    moved = 3 * sizes.source_bytes + 6 * packed_bytes(sizes, options)
    return TEXT_SECONDS + moved / FILE_BYTES_PER_SECOND


def speed_seconds(sizes: ModelSizes, options: QuantizeOptions) -> float:
    """Starting a process, and for source and result loading and decoding."""
    decoded = [size for size in (sizes.source_bytes, result_bytes(sizes, options)) if size <= MOST_DECODED_BYTES]
    return START_SECONDS + sum(DECODE_SECONDS + 4 * size / FILE_BYTES_PER_SECOND for size in decoded)


def _held_out_tokens(options: QuantizeOptions) -> int:
    from quant.run.texts import HELD_OUT_TOKENS

    return HELD_OUT_TOKENS * (2 if options.measures_prose else 1)
