"""What a quantisation refuses before it has read a weight: a source of no use, a name for the result that is taken.

What the text or the machine rules out is refused where those are looked at: `quant.run.texts`, `quant.run.plan`.
"""

from __future__ import annotations

from pathlib import Path

from quant.errors import CheckpointError, QuantizationError
from quant.formats.autogptq import gptq_settings


def refuse_used_name(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise QuantizationError(f"{out} exists and is not empty; give the name of a new directory")


def refuse_unusable_source(source: Path) -> None:
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source} is not a model directory: it has no config.json")
    if gptq_settings(source) is not None:
        raise QuantizationError(f"{source} is quantised already; give the directory of its source weights")
