"""Tiny random checkpoints of every family, written by transformers, whose logits are the reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES: Mapping[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLOOM_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
)
LLAMA3_ROPE: Mapping[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _llama(**options: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **options}))


def _mistral(**options: Any) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**{**SIZES, **options}))


def _qwen2(**options: Any) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**{**SIZES, **options}))


def _qwen3(**options: Any) -> PreTrainedModel:
    values: dict[str, Any] = {**SIZES, "head_dim": 16, **options}
    return Qwen3ForCausalLM(Qwen3Config(**values))


def _cohere(**options: Any) -> PreTrainedModel:
    return CohereForCausalLM(CohereConfig(**{**SIZES, **options}))


def _bloom(**options: Any) -> PreTrainedModel:
    names = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    sizes = {names.get(name, name): value for name, value in SIZES.items() if name in BLOOM_SIZES}
    return BloomForCausalLM(BloomConfig(**{**sizes, **options}))


def _gpt_neox(**options: Any) -> PreTrainedModel:
    values: dict[str, Any] = {**SIZES, "rotary_pct": 0.25, **options}
    del values["num_key_value_heads"]
    return GPTNeoXForCausalLM(GPTNeoXConfig(**values))


MODELS: Mapping[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: _llama(),
    "llama_tied": lambda: _llama(tie_word_embeddings=True),
    "llama_biased": lambda: _llama(attention_bias=True),
    "llama_scaled_rope": lambda: _llama(rope_parameters=dict(LLAMA3_ROPE), num_key_value_heads=6),
    "mistral": lambda: _mistral(head_dim=12, sliding_window=None, rope_parameters={"rope_theta": 1e6}),
    "mistral_windowed": lambda: _mistral(sliding_window=40),
    "qwen2": lambda: _qwen2(tie_word_embeddings=True),
    "qwen3": lambda: _qwen3(),
    "cohere": lambda: _cohere(logit_scale=0.7, attention_bias=True, layer_norm_eps=1e-3),
    "palm": lambda: _cohere(num_key_value_heads=1, logit_scale=48**-0.5, initializer_range=0.6),
    "qwen3_biased": lambda: _qwen3(attention_bias=True, tie_word_embeddings=True),
    "bloom": lambda: _bloom(),  # 6 heads: slopes between two powers of two
    "bloom_eight_heads": lambda: _bloom(n_head=8, tie_word_embeddings=False),
    "gpt_neox": lambda: _gpt_neox(num_attention_heads=3, hidden_act="gelu"),
    "gpt_neox_sequential": lambda: _gpt_neox(
        num_attention_heads=2, use_parallel_residual=False, hidden_act="gelu_new", rotary_emb_base=500
    ),
    "gpt_neox_unbiased": lambda: _gpt_neox(attention_bias=False, rotary_pct=1.0, tie_word_embeddings=True),
}


def build_model(name: str) -> PreTrainedModel:
    """Seeded; biases and norms get random values too, so that none can be forgotten unnoticed."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def save_model(model: PreTrainedModel, directory: Path, *, max_shard_size: str = "1GB") -> None:
    model.save_pretrained(directory, max_shard_size=max_shard_size)


def edit_config(directory: Path, **changes: object) -> None:
    """Set keys of config.json; `...` removes one."""
    path = directory / "config.json"
    config = cast("dict[str, object]", json.loads(path.read_text()))
    config.update(changes)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def random_ids(seed: int = 0, *, batch: int = 2, length: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, cast("int", SIZES["vocab_size"]), (batch, length), generator=generator)
