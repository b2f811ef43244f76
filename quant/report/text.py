"""A quantisation report as Markdown. Only words and tables: what is measured is decided elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from quant.report.measure import Agreement
from quant.report.quantization_report import DecodeSpeed, QuantizationReport, TextComparison
from quant.walk.quantize_model import LayerReport

PLAIN_PATH = "plain (float32, dequantised)"
SERVED_PATH = "as served"
ROUND_TO_NEAREST = "round to nearest (baseline)"


def as_markdown(report: QuantizationReport, *, picture: str | None = None) -> str:
    """picture: name of an image beside the file, if there is one."""
    parts = [
        [f"# Quantisation of {report.source}", "", report.summary[:1].upper() + report.summary[1:] + "."],
        [_options(report)],
        *([[f"![error of each layer, and perplexities]({picture})"]] if picture else []),
        *(_text_section(text) for text in report.texts),
        [_cost(report)],
        *([_speed_table(report.source_speed, report.quantized_speed)] if report.quantized_speed else []),
        _loader_table(report),
        *([_budget_table(report)] if report.budget_percent is not None else []),
        *([_layer_section(report)] if report.layers else []),
        *([_end_section(report)] if report.ends else []),
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _options(report: QuantizationReport) -> str:
    """The settings and the data, in sentences."""
    kind = "symmetric" if report.symmetric else "asymmetric"
    order = {"none": "", "static": ", act-order with static groups", "shuffled": ", act-order with shuffled groups"}
    eight = f" (8 for {', '.join(report.eight_bit)})" if report.eight_bit else ""
    group = "one group a row" if report.group_size == -1 else f"group size {report.group_size}"
    version = f"AutoGPTQ's version {report.checkpoint_format.number}"
    ends = [("head", report.head_bits), ("embeddings", report.embedding_bits)]
    if report.has_tied_table:
        ends = [("head and embeddings, one table,", report.embedding_bits)]
    also = "".join(f", {name} in {bits} bits" for name, bits in ends if bits is not None)
    merged = f" The adapter {report.adapter} was merged into the source first." if report.adapter else ""
    search = "on" if report.range_search else "off"
    return (
        f"GPTQ, {report.bits} bits{eight}, {group}, {kind}{order[report.act_order]}{also}, {version}; "
        f"damping {report.damp:g}, range search {search}, seed {report.seed}. Calibrated on "
        f"{report.calibration_windows:,} windows, {report.calibration_tokens:,} tokens, of {report.calibration.name} "
        f"(sha256 {report.calibration.sha256[:12]}).{merged}"
    )


def _text_section(text: TextComparison) -> list[str]:
    rows: list[tuple[str, Agreement | None]] = [
        (PLAIN_PATH, text.plain),
        (SERVED_PATH, text.served),
        (ROUND_TO_NEAREST, text.round_to_nearest),
    ]
    return [
        f"On {text.tokens:,} held-out tokens of {text.name} (sha256 {text.sha256[:12]}):",
        "",
        "| path | perplexity | change | top-1 agreement | mean KL (nats) | 99 % of tokens below (nats) |",
        "| --- | --: | --: | --: | --: | --: |",
        f"| source | {text.source_perplexity:.4f} | | | | |",
        *(_agreement_row(name, path, text) for name, path in rows if path is not None),
    ]


def _agreement_row(name: str, path: Agreement, text: TextComparison) -> str:
    return (
        f"| {name} | {path.perplexity:.4f} | {text.increase_percent(path):+.2f} % | {path.top1_agreement:.2%} "
        f"| {path.mean_kl:.5f} | {path.kl_p99:.4f} |"
    )


def _cost(report: QuantizationReport) -> str:
    return (
        f"Weights: {_megabytes(report.source_bytes)} before, {_megabytes(report.quantized_bytes)} after. "
        f"Quantised in {report.quantize_seconds:.0f} s, {report.total_seconds:.0f} s with loading, checking and "
        f"measuring; peak memory {_megabytes(report.peak_memory_bytes)}. "
        "Every weight was read back from disk by independent code and equals what was quantised."
    )


def _speed_table(before: DecodeSpeed | None, after: DecodeSpeed | None) -> list[str]:
    rows = [("source, bf16", before), ("result", after)]
    return [
        "| engine | load (s) | decode, one stream (tokens/s) | threads |",
        "| --- | --: | --: | --: |",
        *(
            f"| {name} | {speed.load_seconds:.1f} | {speed.tokens_per_second:.0f} | {speed.threads} |"
            for name, speed in rows
            if speed is not None
        ),
    ]


def _loader_table(report: QuantizationReport) -> list[str]:
    return [
        "Who loads this:",
        "",
        "| tool | loads it | |",
        "| --- | --- | --- |",
        *(f"| {loader.tool} | {'yes' if loader.loads else 'no'} | {loader.reason} |" for loader in report.who_loads),
    ]


def _budget_table(report: QuantizationReport) -> list[str]:
    assert report.budget_percent is not None
    if not report.budget_trials:
        return [f"At most {report.budget_percent:g} % more perplexity was allowed: kept without refining any linear."]
    return [
        f"Search for at most {report.budget_percent:g} % more perplexity, smallest file first. Of each mixture "
        "that was tried: what all linears weigh, and perplexity on the worse of the texts, with what serving adds:",
        "",
        "| linears refined | all linears | perplexity |",
        "| --: | --: | --: |",
        *(
            f"| {trial.refined} | {_megabytes(trial.weight_bytes)} | {trial.increase_percent:+.2f} % |"
            for trial in report.budget_trials
        ),
    ]


def _layer_section(report: QuantizationReport) -> list[str]:
    return [
        "Error of each linear: squared error of its outputs over their squared norm, on the calibration text, in %.",
        "",
        *_layer_table(report.layers, report.bits, report.group_size),
    ]


def _layer_table(layers: Sequence[LayerReport], bits: int, group_size: int) -> list[str]:
    names = [linear.name.rpartition(".")[2] for linear in layers[0].linears]
    lines = [f"| layer | {' | '.join(names)} |", f"| --: |{' --: |' * len(names)}"]
    for layer in layers:
        cells: list[str] = []
        for linear in layer.linears:
            unlike = [f"{linear.bits} bits"] if linear.bits != bits else []
            unlike += [f"group {linear.group_size}"] if linear.group_size != group_size else []
            cells.append(f"{100 * linear.error:.2g}" + (f" ({', '.join(unlike)})" if unlike else ""))
        lines.append(f"| {layer.index} | {' | '.join(cells)} |")
    return lines


def _end_section(report: QuantizationReport) -> list[str]:
    """A head is calibrated as the other linears are; embeddings, which nothing is multiplied by, are not."""
    return [
        "Head and embeddings; the error of embeddings of their own is that of their values, squared and relative.",
        "",
        "| table | bits | group size | error in % |",
        "| --- | --: | --: | --: |",
        *(f"| {end.name} | {end.bits} | {end.group_size} | {100 * end.error:.3f} |" for end in report.ends),
    ]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
