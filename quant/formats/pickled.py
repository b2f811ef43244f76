"""Names pickled weights in a directory and says what to do with them. They are never opened: unpickling runs code."""

from __future__ import annotations

from pathlib import Path

_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_QUANTIZED_MARKS = ("gptq", "4bit", "8bit")


def pickled_hint(directory: Path) -> str:
    """A clause for the end of "DIR has no safetensors file"; empty where nothing pickled lies there."""
    pickled = sorted(path.name for path in directory.glob("*") if path.suffix in _SUFFIXES)
    weights = [name for name in pickled if name not in ("training_args.bin", "optimizer.pt", "scheduler.pt")]
    if not weights:
        return ""
    is_quantized = (directory / "quantize_config.json").exists() or any(
        mark in weights[0].lower() for mark in _QUANTIZED_MARKS
    )
    cure = (
        "load it once where you trust it, with the program that wrote it, and save it as safetensors (auto-gptq: "
        "model.save_quantized(DIR, use_safetensors=True)), or quantise the source model with `causerie quantize`"
        if is_quantized
        else "convert it to safetensors (transformers: from_pretrained(DIR).save_pretrained(OUT))"
    )
    kind = "a pickled GPTQ checkpoint" if is_quantized else "pickled"
    return f"; {weights[0]} is {kind}, which is never read: {cure}"
