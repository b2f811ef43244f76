"""The quality report beside the weights: `quantization_report.json` for programs, `.md` to read, `.png` to look at.

`quant.run.quantize_directory` fills it in; `quant.report.summary` reads the summary of any version back.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from quant.formats.checkpoint_format import CheckpointFormat
from quant.model_directory import DataFile
from quant.report.loaders import Loader, WrittenFormat, who_loads
from quant.report.measure import Agreement
from quant.report.summary import REPORT_JSON, summary_of
from quant.walk.ends import EMBEDDINGS
from quant.walk.quantize_model import LayerReport, LinearReport

logger = logging.getLogger(__name__)

REPORT_MARKDOWN = "quantization_report.md"
REPORT_PLOT = "quantization_report.png"
# 1 had one held-out text, and none of the fields that describe a text, the baseline, the speed and the head.
REPORT_VERSION = 2
# Larger weights than this are not decoded for their speed: loading them would take longer than the figure is worth.
MOST_DECODED_BYTES = 2 * 10**9


@dataclass(frozen=True, slots=True)
class TextComparison:
    """How the result predicts one held-out text, beside its source.

    name, sha256:     of the text's file
    tokens:           compared
    plain:            dequantised weights, float32 arithmetic
    served:           the path that serves, with its rounded activations; None where there is none to measure
    round_to_nearest: the same bits and groups without GPTQ, on the plain path: the baseline; None if not measured
    """

    name: str
    sha256: str
    tokens: int
    source_perplexity: float
    plain: Agreement
    served: Agreement | None = None
    round_to_nearest: Agreement | None = None

    @property
    def result_paths(self) -> tuple[Agreement, ...]:
        """The result's own, without the baseline."""
        return (self.plain,) if self.served is None else (self.plain, self.served)

    def increase_percent(self, path: Agreement) -> float:
        """How much higher its perplexity is than the source's."""
        return 100.0 * (path.perplexity / self.source_perplexity - 1.0)


@dataclass(frozen=True, slots=True)
class DecodeSpeed:
    """One stream, greedy, in the engine: loading in seconds, then tokens per second. `threads` were used."""

    load_seconds: float
    tokens_per_second: float
    threads: int


@dataclass(frozen=True, slots=True)
class BudgetTrial:
    """One step of the search for a perplexity budget: how many linears were refined, and what that gave.

    refined:          linears that got 8 bits or a smaller group than the others
    weight_bytes:     of all linears together
    increase_percent: of perplexity over the source's
    """

    refined: int
    weight_bytes: int
    increase_percent: float


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """What was done and what it cost. Times in seconds, sizes in bytes.

    source:          the source's name; `adapter` the name of what was merged into it first, or None
    bits, group_size: of the linears that are not listed otherwise in `layers`; -1 is one group over all inputs
    eight_bit:       linears that were asked to have 8 bits in every layer
    act_order:       "none", "static" or "shuffled"
    range_search:    whether each group's range was chosen by its error
    calibration:     the file that the calibration text came from; `calibration_tokens` in all of its windows
    texts:           the held-out texts, at least one
    layers:          bits, group size and error of every linear
    ends:            likewise of the tables of the vocabulary that are quantised; a tied one is the embeddings
    head_bits, embedding_bits: None where they are plain
    source_bytes, quantized_bytes: of the weight files
    source_speed, quantized_speed: of the engine on the source in bf16 and on the result; None if not measured
    budget_percent:  the limit that was searched for, or None; `budget_trials` is the search
    checkpoint_format: the version of AutoGPTQ's layout it is written in
    """

    source: str
    bits: int
    eight_bit: tuple[str, ...]
    group_size: int
    symmetric: bool
    act_order: str
    damp: float
    calibration: DataFile
    calibration_windows: int
    calibration_tokens: int
    texts: tuple[TextComparison, ...]
    layers: Sequence[LayerReport]
    source_bytes: int
    quantized_bytes: int
    quantize_seconds: float
    total_seconds: float
    peak_memory_bytes: int
    range_search: bool = True
    head_bits: int | None = None
    embedding_bits: int | None = None
    ends: tuple[LinearReport, ...] = ()
    adapter: str | None = None
    seed: int = 0
    source_speed: DecodeSpeed | None = None
    quantized_speed: DecodeSpeed | None = None
    budget_percent: float | None = None
    budget_trials: tuple[BudgetTrial, ...] = ()
    checkpoint_format: CheckpointFormat = CheckpointFormat.V1

    @property
    def perplexity_increase_percent(self) -> float:
        """The worst of all texts, on the plain path and on the one that serves."""
        return max(text.increase_percent(path) for text in self.texts for path in text.result_paths)

    @property
    def top1_agreement(self) -> float:
        """The worst of all texts and of both paths, 0 to 1."""
        return min(path.top1_agreement for text in self.texts for path in text.result_paths)

    @property
    def mean_kl(self) -> float:
        """The worst of all texts and of both paths, nats per token."""
        return max(path.mean_kl for text in self.texts for path in text.result_paths)

    @property
    def has_tied_table(self) -> bool:
        """Whether head and embeddings are one quantised table."""
        return self.head_bits is not None and [end.name for end in self.ends] == [EMBEDDINGS]

    @property
    def written_format(self) -> WrittenFormat:
        linears = [linear for layer in self.layers for linear in layer.linears]
        return WrittenFormat(
            bits=frozenset(linear.bits for linear in linears) or frozenset({self.bits}),
            group_sizes=frozenset(linear.group_size for linear in linears) or frozenset({self.group_size}),
            symmetric=self.symmetric,
            act_order=self.act_order,
            head_bits=self.head_bits,
            embedding_bits=self.embedding_bits,
            checkpoint_format=self.checkpoint_format,
        )

    @property
    def who_loads(self) -> tuple[Loader, ...]:
        return who_loads(self.written_format)

    @property
    def summary(self) -> str:
        """One line: what it is, and what it cost."""
        return summary_of(self.as_record()).line

    def as_record(self) -> dict[str, object]:
        """What the JSON file holds. The first text stands at the top level too, where version 1 had its only one."""
        first = self.texts[0]
        return {
            "version": REPORT_VERSION,
            **asdict(self),
            "perplexity_increase_percent": self.perplexity_increase_percent,
            "top1_agreement": self.top1_agreement,
            "mean_kl": self.mean_kl,
            "who_loads": [asdict(loader) for loader in self.who_loads],
            "held_out_tokens": first.tokens,
            "source_perplexity": first.source_perplexity,
            "plain": asdict(first.plain),
            "served": None if first.served is None else asdict(first.served),
        }


def write_report(directory: Path, report: QuantizationReport) -> None:
    """JSON, Markdown and, where matplotlib is installed, the picture."""
    from quant.report.plot import is_plot_possible, write_plot
    from quant.report.text import as_markdown

    (directory / REPORT_JSON).write_text(json.dumps(report.as_record(), indent=2) + "\n", encoding="utf-8")
    has_plot = is_plot_possible()
    if has_plot:
        write_plot(report, directory / REPORT_PLOT)
    else:
        logger.info("report_without_picture reason=matplotlib_is_not_installed")
    text = as_markdown(report, picture=REPORT_PLOT if has_plot else None)
    (directory / REPORT_MARKDOWN).write_text(text, encoding="utf-8")
