"""Small random chat models as model directories, and judges without weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM

from serving.model.chat_format import ChatMessage
from tests.serving.model.tiny_tokenizers import write_tokenizer
from training.errors import TrainingError

CONTEXT = 1024


def write_llama(directory: Path, *, seed: int = 0, context: int = CONTEXT, tokenizer: str = "smollm2") -> Path:
    """With a spread of weights that makes distributions uneven, so that seeds and models differ."""
    directory.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=448,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(directory)
    write_tokenizer(tokenizer, directory)
    return directory


def write_palm(directory: Path, *, seed: int = 0) -> Path:
    directory.mkdir(parents=True)
    config = CohereConfig(
        vocab_size=448,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        use_qk_norm=False,
        attention_bias=False,
        tie_word_embeddings=True,
        logit_scale=32**-0.5,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    CohereForCausalLM(config).save_pretrained(directory)
    write_tokenizer("smollm2", directory)
    return directory


class CountingScorer:
    """Likes long answers, or short ones; counts how often it was asked."""

    def __init__(self, sign: float = 1.0) -> None:
        self.sign = sign
        self.num_calls = 0

    def score(self, conversations: Sequence[Sequence[ChatMessage]]) -> list[float]:
        self.num_calls += 1
        return [self.sign * len(messages[-1].content) for messages in conversations]


def load_fake_scorer(directory: Path) -> CountingScorer:
    """`long` and `short` are judges' names here, not directories."""
    signs = {"long": 1.0, "short": -1.0}
    if directory.name not in signs:
        raise TrainingError(f"{directory} is no judge")
    return CountingScorer(signs[directory.name])
