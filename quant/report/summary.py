"""The summary of a quantisation report, read back from its JSON file, of this version or of an older one.

Apart from `quant.report.quantization_report` so that a server can read it without torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from quant.errors import CheckpointError

REPORT_JSON = "quantization_report.json"


@dataclass(frozen=True, slots=True)
class ReportSummary:
    """What a server wants to know of a report: one line to show, and the worst top-1 agreement, 0 to 1."""

    line: str
    top1_agreement: float


def read_summary(directory: Path) -> ReportSummary | None:
    """Of a report of any version; None where there is none. CheckpointError if there is one that cannot be read."""
    path = directory / REPORT_JSON
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise TypeError(f"it holds {type(record).__name__}")
        return summary_of(cast("Mapping[str, object]", record))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not a quantisation report ({error}); quantise the model again, or delete the file"
        ) from error


def summary_of(record: Mapping[str, object]) -> ReportSummary:
    """From the JSON file's content. Raises TypeError, ValueError or KeyError where it is not what a report holds."""
    paths = _paths(record)
    source, worst = max(_worst_of_each_text(record), key=lambda pair: pair[1] / pair[0])
    # Version 1 has no figures over all texts: it had one.
    top1 = _number(record.get("top1_agreement", min(_number(path["top1_agreement"]) for path in paths)))
    mean_kl = _number(record.get("mean_kl", max(_number(path["mean_kl"]) for path in paths)))
    if not 0 <= top1 <= 1:
        raise ValueError(f"top1_agreement is {top1}, expected 0 to 1")
    line = (
        f"{record['bits']} bits, group size {record['group_size']}, "
        f"{'symmetric' if record['symmetric'] else 'asymmetric'}, {_number(record['quantized_bytes']) / 1e6:,.0f} MB "
        f"(source {_number(record['source_bytes']) / 1e6:,.0f} MB): "
        f"perplexity {source:.3f} -> {worst:.3f} "
        f"({_number(record['perplexity_increase_percent']):+.2f} %), top-1 agreement {top1:.1%}, "
        f"mean KL {mean_kl:.4f} nats"
    )
    return ReportSummary(line, top1)


def _paths(record: Mapping[str, object]) -> list[Mapping[str, object]]:
    """The result's own, without the baseline; of a report, or of one of its texts."""
    return [cast("Mapping[str, object]", record[name]) for name in ("plain", "served") if record.get(name)]


def _worst_of_each_text(record: Mapping[str, object]) -> Iterator[tuple[float, float]]:
    """Perplexity of the source and the highest of the result. Version 1 had one text, at the top level."""
    for text in cast("Sequence[Mapping[str, object]]", record.get("texts") or [record]):
        source = _number(text["source_perplexity"])
        if source <= 0:
            raise ValueError(f"source_perplexity is {source}, expected more than 0")
        yield source, max(_number(path["perplexity"]) for path in _paths(text))


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"found {value!r} where a number belongs")
    return float(value)
