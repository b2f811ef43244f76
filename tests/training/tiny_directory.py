"""A model directory of a random PaLM of a few thousand weights with a tokenizer of its own, for tests of stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from serving.model.tokenizer import ModelTokenizer
from training.distributed import full_tensors
from training.pretrain import build_model
from training.settings import AdapterSettings
from training.sizes import SIZES, ModelSize
from training.tokenizer import train_tokenizer, write_tokenizer
from training.trunk import Compute, Trunk, load_chat_format, write_weights

CPU = Compute(torch.device("cpu"), torch.float32)
FULL = AdapterSettings(method="full")
VOCAB_SIZE = 280
LENGTH = 128
TEXTS = tuple(f"The {animal} number {count} sat on a mat." for animal in ("cat", "dog", "hen") for count in range(40))

TINY_SIZE: ModelSize = replace(
    SIZES["palm-2m"], hidden=32, layers=2, heads=4, head_dim=8, intermediate=64, vocab=VOCAB_SIZE
)


def write_tiny_directory(directory: Path, *, seed: int = 0, is_base: bool = False) -> Path:
    """Everything that a stage reads and `serve` takes; a base model has no chat template."""
    directory.mkdir(parents=True)
    write_tokenizer(train_tokenizer(TEXTS, VOCAB_SIZE), directory)
    if is_base:
        (directory / "chat_template.jinja").unlink()
    tokenizer = ModelTokenizer.load(directory)
    torch.manual_seed(seed)
    model = build_model(TINY_SIZE, tokenizer, LENGTH)
    trunk = Trunk(model, tokenizer, load_chat_format(directory, tokenizer), directory, CPU)
    write_weights(trunk, directory, FULL, full_tensors(model))
    return directory
