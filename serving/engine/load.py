"""From a model directory to an engine that runs it."""

from __future__ import annotations

from pathlib import Path

import torch

from quant.bitsandbytes_linear import LoadIn
from quant.formats.checkpoint_names import checkpoint_names
from quant.heap import give_back_free_memory
from serving.engine.engine import Engine, EngineLimits
from serving.engine.prepare import prepare
from serving.model.tokenizer import ModelTokenizer
from serving.model.weights import load_decoder, read_config

__all__ = ["load_engine"]


def load_engine(
    directory: Path,
    *,
    kv_bytes: int,
    exact: bool,
    limits: EngineLimits | None = None,
    prefix_cache: bool = True,
    prompt_lookup: bool = False,
    int8_kv: bool = False,
    load_in: LoadIn | None = None,
) -> Engine:
    """The engine of a model directory. Raises CheckpointError for anything it cannot serve."""
    tokenizer = ModelTokenizer.load(directory)
    decoder = load_decoder(directory, dtype=torch.float32 if exact else torch.bfloat16)
    model = prepare(decoder, exact=exact, load_in=load_in)
    del decoder
    # Unpacking leaves its temporaries in the heap's gaps, a quarter of the process.
    give_back_free_memory()
    return Engine(
        model,
        kv_bytes=kv_bytes,
        tokenizer=tokenizer,
        limits=limits,
        prefix_cache=prefix_cache,
        prompt_lookup=prompt_lookup,
        int8_kv=int8_kv,
        names=checkpoint_names(read_config(directory)),
    )
