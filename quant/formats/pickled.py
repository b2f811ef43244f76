"""Names pickled weights in a directory and says what to do with them. They are never opened: unpickling runs code."""

from __future__ import annotations

import json
from pathlib import Path

_PATTERNS = ("*.bin", "*.pt", "*.pth")
# What trainers leave beside the weights.
_OTHER_FILES = frozenset({"training_args.bin", "optimizer.pt", "scheduler.pt"})


def pickled_hint(directory: Path) -> str:
    """A clause for the end of "DIR has no safetensors file"; empty where nothing pickled lies there."""
    names = {file.name for pattern in _PATTERNS for file in directory.glob(pattern)} - _OTHER_FILES
    if not names:
        return ""
    if not _is_quantized(directory, min(names)):
        return f"; {min(names)} is pickled, which is never read: convert it to safetensors"
    return (
        f"; {min(names)} is a pickled GPTQ file, which is never read, since opening one runs its author's code: "
        "quantise the source model with `causerie quantize`, or have the tool that wrote the file write it again with "
        "use_safetensors=True"
    )


def _is_quantized(directory: Path, name: str) -> bool:
    """By the settings beside the file, or by a name that AutoGPTQ and its predecessors give."""
    if (directory / "quantize_config.json").is_file() or any(mark in name.lower() for mark in ("gptq", "4bit", "8bit")):
        return True
    try:
        return "quantization_config" in json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
