"""A random Llama of a few thousand weights, and samples of random ids, for tests of training."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from training.batches import Sample

VOCAB_SIZE = 64


def tiny_llama(seed: int = 0, *, layers: int = 2) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def random_samples(count: int, seed: int = 0) -> list[Sample]:
    """Of 4 to 12 ids; the first two are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 13, (count,), generator=generator).tolist()
    ids = [torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    return [Sample(tuple(row), (False, False, *[True] * (len(row) - 2))) for row in ids]
