"""The quality report beside the weights: `quantization_report.json` for programs, `quantization_report.md` to read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from quant.gptq import ActOrder
from quant.measure import Agreement
from quant.quantize_model import LayerReport

REPORT_JSON = "quantization_report.json"
REPORT_MARKDOWN = "quantization_report.md"
_ACT_ORDER_WORDS: Final[Mapping[ActOrder, str]] = {
    ActOrder.NONE: "",
    ActOrder.STATIC: ", act-order with static groups",
    ActOrder.SHUFFLED: ", true act-order (shuffled groups)",
}


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """What was done and what it cost. `served` is None where no serving path was given to measure.

    Times in seconds, sizes in bytes. `largest_logit_difference`: between the model in memory and the one read back.
    """

    source: str
    bits: int
    eight_bit: tuple[str, ...]  # linears that got 8 bits in every layer
    group_size: int
    symmetric: bool
    act_order: ActOrder
    damp: float
    calibration_tokens: int
    held_out_tokens: int
    source_perplexity: float
    plain: Agreement
    served: Agreement | None
    layers: Sequence[LayerReport]
    source_bytes: int
    quantized_bytes: int
    quantize_seconds: float
    total_seconds: float
    peak_memory_bytes: int
    largest_logit_difference: float

    @property
    def perplexity_increase_percent(self) -> float:
        """On the path that serves if it was measured, else on the plain one: the worse of the two."""
        worst = max(path.perplexity for path in (self.plain, self.served) if path is not None)
        return 100.0 * (worst / self.source_perplexity - 1.0)


def write_report(directory: Path, report: QuantizationReport) -> None:
    record = {**asdict(report), "perplexity_increase_percent": report.perplexity_increase_percent}
    (directory / REPORT_JSON).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (directory / REPORT_MARKDOWN).write_text(as_markdown(report), encoding="utf-8")


def as_markdown(report: QuantizationReport) -> str:
    kind = "symmetric" if report.symmetric else "asymmetric"
    order = _ACT_ORDER_WORDS[report.act_order]
    eight = f" (8 for {', '.join(report.eight_bit)})" if report.eight_bit else ""
    rows = [("plain (float32, dequantised)", report.plain)]
    if report.served is not None:
        rows.append(("as served", report.served))
    lines = [
        f"# Quantisation of {report.source}",
        "",
        f"GPTQ, {report.bits} bits{eight}, group size {report.group_size}, {kind}{order}; "
        f"{report.calibration_tokens:,} calibration tokens, {report.held_out_tokens:,} held-out tokens.",
        "",
        "| path | perplexity | change | top-1 agreement | mean KL (nats) |",
        "| --- | --: | --: | --: | --: |",
        f"| source | {report.source_perplexity:.4f} | | | |",
        *(_agreement_row(name, path, report.source_perplexity) for name, path in rows),
        "",
        f"Weights: {_megabytes(report.source_bytes)} before, {_megabytes(report.quantized_bytes)} after. "
        f"Quantised in {report.quantize_seconds:.0f} s, {report.total_seconds:.0f} s with loading, checking and "
        f"measuring; peak memory {_megabytes(report.peak_memory_bytes)}. "
        f"Read back from disk by independent code: largest logit difference {report.largest_logit_difference:.1e}.",
        "",
        "Error of each linear: squared error of its outputs over their squared norm, on the calibration text, in %.",
        "",
        *_layer_table(report.layers),
    ]
    return "\n".join(lines) + "\n"


def _agreement_row(name: str, path: Agreement, before: float) -> str:
    change = 100.0 * (path.perplexity / before - 1.0)
    return f"| {name} | {path.perplexity:.4f} | {change:+.2f} % | {path.top1_agreement:.2%} | {path.mean_kl:.5f} |"


def _layer_table(layers: Sequence[LayerReport]) -> list[str]:
    if not layers:
        return []
    names = [linear.name.rpartition(".")[2] for linear in layers[0].linears]
    lines = [f"| layer | {' | '.join(names)} |", f"| --: |{' --: |' * len(names)}"]
    for layer in layers:
        errors = " | ".join(
            f"{100 * linear.error:.3f}" + ("" if linear.bits == 4 else f" ({linear.bits} bits)")
            for linear in layer.linears
        )
        lines.append(f"| {layer.index} | {errors} |")
    return lines


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
