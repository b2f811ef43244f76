"""Named model sizes: their parameter counts, and the config.json that transformers and the engine build them from.

Torch-free: planning reads the largest ones without building anything. `palm-*` are PaLM's architecture at any width;
the others are what people compare with.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from quant.model_directory import JsonValue
from training.errors import TrainingError

__all__ = ["SIZES", "ModelSize", "config_of", "find_size"]

Positions: TypeAlias = Literal["rotary", "alibi", "learned"]


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Dimensions of a decoder.

    intermediate: width of the feed-forward part; gated ones have three matrices of it, the others two
    tied:         the head is the embedding
    parallel:     attention and feed-forward read the same normed input, so a layer has one norm and not two
    biased:       every linear and norm has a bias (GPT-2, GPT-3, BLOOM)
    embedding_norm: a norm follows the embedding (BLOOM)
    """

    name: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    tied: bool
    parallel: bool
    max_positions: int = 2048
    gated: bool = True
    biased: bool = False
    positions: Positions = "rotary"
    embedding_norm: bool = False
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def is_buildable(self) -> bool:
        """PaLM- and Llama-style models; the others are there to plan with."""
        return self.gated and not self.biased and self.positions == "rotary"

    @property
    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def layer_parameters(self) -> int:
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        feed_forward = (3 if self.gated else 2) * self.hidden * self.intermediate
        norms = (1 if self.parallel else 2) * self.hidden
        return attention + feed_forward + norms + (self._layer_biases if self.biased else 0)

    @property
    def parameters(self) -> int:
        """Every trainable number, embeddings and norms included."""
        norm = self.hidden * (2 if self.biased else 1)
        positions = self.max_positions * self.hidden if self.positions == "learned" else 0
        outside = self.embedding_parameters * (1 if self.tied else 2) + positions
        return outside + self.layers * self.layer_parameters + norm * (2 if self.embedding_norm else 1)

    @property
    def _layer_biases(self) -> int:
        projections = (self.heads + 2 * self.kv_heads) * self.head_dim + self.hidden
        return projections + self.intermediate + self.hidden + (1 if self.parallel else 2) * self.hidden


def find_size(name: str) -> ModelSize:
    """Raises TrainingError with the nearest name."""
    if name in SIZES:
        return SIZES[name]
    close = difflib.get_close_matches(name, SIZES, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(SIZES)}"
    raise TrainingError(f"there is no model size {name!r}; {hint}")


def config_of(size: ModelSize) -> dict[str, JsonValue]:
    """The config.json of a new model, float32, without special tokens: those are the tokenizer's to say.

    Raises TrainingError for a size that is listed for planning only (learned positions, ALiBi or ungated layers).
    """
    if not size.is_buildable:
        raise TrainingError(f"{size.name} is a size to plan with; PaLM-style and Llama-style models can be built")
    common: dict[str, JsonValue] = {
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": size.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": size.rope_theta},
        "tie_word_embeddings": size.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        # Without these, transformers takes ids of another vocabulary, and a padding id's embedding gets no gradient.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": "float32",
    }
    return _palm_config(size, common) if size.parallel else _llama_config(size, common)


def _palm_config(size: ModelSize, common: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Cohere's layers with one key/value head are PaLM's (arXiv:2204.02311, section 2)."""
    return {
        "architectures": ["CohereForCausalLM"],
        "model_type": "cohere",
        **common,
        "layer_norm_eps": size.norm_eps,
        "logit_scale": size.hidden**-0.5,
        "use_qk_norm": False,
    }


def _llama_config(size: ModelSize, common: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **common,
        "rms_norm_eps": size.norm_eps,
        "mlp_bias": False,
    }


def _palm(name: str, hidden: int, layers: int, heads: int, *, head_dim: int = 256, vocab: int = 256_000) -> ModelSize:
    """arXiv:2204.02311, section 2 and table 1: multi-query, feed-forward 4 times as wide, tied embeddings."""
    return ModelSize(
        name=name,
        vocab=vocab,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=1,
        head_dim=head_dim,
        intermediate=4 * hidden,
        tied=True,
        parallel=True,
    )


def _llama(
    name: str,
    hidden: int,
    layers: int,
    heads: int,
    intermediate: int,
    *,
    kv_heads: int | None = None,
    vocab: int = 32_000,
    tied: bool = False,
    max_positions: int = 2048,
    rope_theta: float = 10_000.0,
) -> ModelSize:
    return ModelSize(
        name=name,
        vocab=vocab,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=hidden // heads,
        intermediate=intermediate,
        tied=tied,
        parallel=False,
        max_positions=max_positions,
        rope_theta=rope_theta,
    )


def _gpt(name: str, hidden: int, layers: int, heads: int, *, max_positions: int) -> ModelSize:
    """GPT-2 and GPT-3 (arXiv:2005.14165, table 2.1): learned positions, biases, GELU, tied embeddings."""
    return ModelSize(
        name=name,
        vocab=50_257,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=4 * hidden,
        tied=True,
        parallel=False,
        max_positions=max_positions,
        gated=False,
        biased=True,
        positions="learned",
    )


# arXiv:2211.05100, table 3.
_BLOOM_176B = ModelSize(
    name="bloom-176b",
    vocab=250_880,
    hidden=14_336,
    layers=70,
    heads=112,
    kv_heads=112,
    head_dim=128,
    intermediate=4 * 14_336,
    tied=True,
    parallel=False,
    gated=False,
    biased=True,
    positions="alibi",
    embedding_norm=True,
)


def _by_name(sizes: Iterable[ModelSize]) -> Mapping[str, ModelSize]:
    return {size.name: size for size in sizes}


SIZES: Mapping[str, ModelSize] = _by_name(
    (
        _palm("palm-2m", 128, 6, 4, head_dim=32, vocab=4096),
        _palm("palm-10m", 256, 8, 8, head_dim=32, vocab=4096),
        _palm("palm-50m", 512, 10, 8, head_dim=64, vocab=16_384),
        _palm("palm-150m", 768, 16, 12, head_dim=64, vocab=32_000),
        _palm("palm-1b", 2048, 16, 8, vocab=32_000),
        _palm("palm-8b", 4096, 32, 16),
        _palm("palm-62b", 8192, 64, 32),
        _palm("palm-540b", 18_432, 118, 48),
        # SmolLM2-135M's dimensions.
        _llama(
            "llama-135m",
            576,
            30,
            9,
            1536,
            kv_heads=3,
            vocab=49_152,
            tied=True,
            max_positions=8192,
            rope_theta=100_000.0,
        ),
        _llama("llama-1b5", 2048, 26, 16, 5632),
        # arXiv:2302.13971, table 2.
        _llama("llama-7b", 4096, 32, 32, 11_008),
        _llama("llama-13b", 5120, 40, 40, 13_824),
        _gpt("gpt2-1b5", 1600, 48, 25, max_positions=1024),
        _gpt("gpt3-175b", 12_288, 96, 96, max_positions=2048),
        _BLOOM_176B,
    )
)
