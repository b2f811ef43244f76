"""What a decoder is made of, as one record, and how that record is read from a checkpoint's config.json.

A family is one function in `_FAMILIES`; nothing else in the product asks which family a model belongs to. Options that
would change the logits and are not implemented are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import cast

from quant.errors import CheckpointError


class Norm(StrEnum):
    RMS = "rms"
    LAYER = "layer"
    LAYER_WITH_BIAS = "layer_with_bias"


class BlockForm(StrEnum):
    SEQUENTIAL = "sequential"  # attention, then feed-forward on its result
    PARALLEL = "parallel"  # both read the same normed input: PaLM
    PARALLEL_TWO_NORMS = "parallel_two_norms"  # both read the layer's input, each through its own norm: GPT-NeoX


class Positions(StrEnum):
    ROTARY_HALVES = "rotary_halves"  # dimension i turns with i + rotary_dims / 2
    ROTARY_INTERLEAVED = "rotary_interleaved"  # dimension 2i turns with 2i + 1: PaLM
    ALIBI = "alibi"  # nothing turns; scores fall with the distance, in each head at its own rate: BLOOM


class Activation(StrEnum):
    """Of the feed-forward part; SwiGLU multiplies by a second projection, the others have one."""

    SWIGLU = "swiglu"
    GELU = "gelu"  # by the error function
    GELU_TANH = "gelu_tanh"  # its approximation by tanh


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's stretch of the slow rotary frequencies. Lengths in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm: Norm
    norm_eps: float
    block: BlockForm
    positions: Positions
    rope_theta: float
    rope_scaling: RopeScaling | None
    activation: Activation
    qkv_bias: bool
    out_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    max_positions: int  # already cut to the attention window where layers slide: up to it a window changes nothing
    logit_scale: float = 1.0  # what the head's output is multiplied by
    rotary_dims: int | None = None  # how many of a head's dimensions turn, from its first; None: all
    mlp_bias: bool = False
    embedding_norm: bool = False

    @property
    def num_turned(self) -> int:
        """Dimensions of a head that its position turns: 0 with ALiBi."""
        if self.positions is Positions.ALIBI:
            return 0
        return self.head_dim if self.rotary_dims is None else self.rotary_dims

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "max_positions"):
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} must be positive; found {getattr(self, name)}")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise CheckpointError(f"head_dim must be even for rotary positions; found {self.head_dim}")
        if self.num_turned % 2 or not 0 <= self.num_turned <= self.head_dim:
            raise CheckpointError(
                f"rotary dimensions must be an even number up to head_dim ({self.head_dim}); found {self.num_turned}"
            )
        if not 0 < self.logit_scale < math.inf:
            raise CheckpointError(f"logit_scale must be a positive number; found {self.logit_scale}")


def supported_architectures() -> tuple[str, ...]:
    return tuple(_FAMILIES)


def spec_from_config(config: Mapping[str, object]) -> DecoderSpec:
    """Read config.json's content. CheckpointError names the architecture, key or option that is not supported."""
    names = config.get("architectures")
    found = [str(name) for name in cast("list[object]", names)] if isinstance(names, list) else []
    for name in found:
        if name in _FAMILIES:
            return _FAMILIES[name](_ConfigReader(config))
    raise CheckpointError(
        f"architecture {', '.join(found) or 'none named'} is not supported; supported are {', '.join(_FAMILIES)}"
    )


class _ConfigReader:
    """Typed look-ups in config.json; null counts as absent, as transformers writes both."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values

    def has(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> object:
        return self._values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(f"config.json: {key} must be a whole number; found {value!r}")
        return value

    def first_integer(self, *keys: str) -> int:
        """Of an option that has had several names: the first that is there."""
        return self.integer(next((key for key in keys if self.get(key) is not None), keys[0]))

    def number(self, key: str, default: float | None = None) -> float:
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"config.json: {key} must be a number; found {value!r}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {key} must be true or false; found {value!r}")
        return value

    def section(self, key: str) -> _ConfigReader | None:
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise CheckpointError(f"config.json: {key} must be an object; found {value!r}")
        return _ConfigReader(cast("Mapping[str, object]", value))

    def has_sections(self) -> bool:
        return any(isinstance(value, Mapping) for value in self._values.values())

    def refuse_unless(self, key: str, *accepted: object) -> None:
        """For an option that would change the logits: absent, null or one of `accepted`."""
        value = self._values.get(key)
        if value is not None and value not in accepted:
            expected = " or ".join(repr(choice) for choice in accepted)
            raise CheckpointError(f"config.json: {key} = {value!r} is not supported; {expected} is")


def _llama(config: _ConfigReader) -> DecoderSpec:
    config.refuse_unless("mlp_bias", False)
    bias = config.flag("attention_bias")
    kv_heads = config.integer("num_key_value_heads", config.integer("num_attention_heads"))
    return _spec("llama", config, kv_heads=kv_heads, qkv_bias=bias, out_bias=bias)


def _mistral(config: _ConfigReader) -> DecoderSpec:
    return _spec("mistral", config, window=_mistral_window(config))


def _qwen2(config: _ConfigReader) -> DecoderSpec:
    return _spec("qwen2", config, qkv_bias=True, window=_qwen_window(config))


def _qwen3(config: _ConfigReader) -> DecoderSpec:
    bias = config.flag("attention_bias")
    head_dim = config.integer("head_dim", 128)
    return _spec(
        "qwen3", config, head_dim=head_dim, qkv_bias=bias, out_bias=bias, qk_norm=True, window=_qwen_window(config)
    )


def _cohere(config: _ConfigReader) -> DecoderSpec:
    """With one key/value head and `logit_scale` = hidden_size ** -0.5 this is PaLM (arXiv:2204.02311, section 2)."""
    config.refuse_unless("use_qk_norm", False)
    bias = config.flag("attention_bias")
    kv_heads = config.integer("num_key_value_heads", config.integer("num_attention_heads"))
    common = _spec("cohere", config, kv_heads=kv_heads, qkv_bias=bias, out_bias=bias, default_theta=500_000.0)
    return replace(
        common,
        norm=Norm.LAYER,
        norm_eps=config.number("layer_norm_eps", 1e-5),
        block=BlockForm.PARALLEL,
        positions=Positions.ROTARY_INTERLEAVED,
        tied_embeddings=config.flag("tie_word_embeddings", default=True),
        logit_scale=config.number("logit_scale", 0.0625),
    )


def _bloom(config: _ConfigReader) -> DecoderSpec:
    """ALiBi (arXiv:2108.12409), biases everywhere, a norm after the embeddings (arXiv:2211.05100, section 3.2)."""
    config.refuse_unless("apply_residual_connection_post_layernorm", False)
    hidden_size = config.first_integer("hidden_size", "n_embed")
    num_heads = config.first_integer("n_head", "num_attention_heads")
    return DecoderSpec(
        family="bloom",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_layers=config.first_integer("n_layer", "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=_even_share(hidden_size, num_heads),
        norm=Norm.LAYER_WITH_BIAS,
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        block=BlockForm.SEQUENTIAL,
        positions=Positions.ALIBI,
        rope_theta=10_000.0,
        rope_scaling=None,
        activation=Activation.GELU_TANH,
        qkv_bias=True,
        out_bias=True,
        qk_norm=False,
        tied_embeddings=config.flag("tie_word_embeddings", default=True),
        max_positions=config.integer("seq_length", _BLOOM_TRAINED_TOKENS),
        mlp_bias=True,
        embedding_norm=True,
    )


def _gpt_neox(config: _ConfigReader) -> DecoderSpec:
    """Both blocks beside each other with a norm each, and rotary positions on a quarter of a head: arXiv:2204.06745."""
    hidden_size, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = _even_share(hidden_size, num_heads)
    name = config.get("hidden_act") or "gelu"
    if not isinstance(name, str) or name not in _NEOX_ACTIVATIONS:
        raise CheckpointError(
            f"config.json: hidden_act = {name!r} is not supported; {', '.join(_NEOX_ACTIVATIONS)} are"
        )
    share = _rope_section(config).number("partial_rotary_factor", config.number("rotary_pct", 0.25))
    rope_theta, rope_scaling = _rope(config, config.number("rotary_emb_base", 10_000.0))
    if rope_scaling is not None:
        raise CheckpointError("config.json: scaled rotary positions are not supported for GPT-NeoX")
    bias = config.flag("attention_bias", default=True)
    is_parallel = config.flag("use_parallel_residual", default=True)
    return DecoderSpec(
        family="gpt_neox",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=config.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        norm=Norm.LAYER_WITH_BIAS,
        norm_eps=config.number("layer_norm_eps", 1e-5),
        block=BlockForm.PARALLEL_TWO_NORMS if is_parallel else BlockForm.SEQUENTIAL,
        positions=Positions.ROTARY_HALVES,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        activation=_NEOX_ACTIVATIONS[name],
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=False,
        tied_embeddings=config.flag("tie_word_embeddings"),
        max_positions=config.integer("max_position_embeddings"),
        rotary_dims=int(head_dim * share),
        mlp_bias=True,
    )


# BLOOM's config need not say how long its training texts were; ALiBi goes further, at a quality nobody measured here.
_BLOOM_TRAINED_TOKENS = 2048
# transformers' names; `gelu_fast` and `gelu_new` are the tanh form with its constant written in two ways.
_NEOX_ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": Activation.GELU,
    "gelu_python": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
}
_FAMILIES: Mapping[str, Callable[[_ConfigReader], DecoderSpec]] = {
    "BloomForCausalLM": _bloom,
    "CohereForCausalLM": _cohere,
    "GPTNeoXForCausalLM": _gpt_neox,
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
}


def _spec(
    family: str,
    config: _ConfigReader,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    qk_norm: bool = False,
    window: int | None = None,
    default_theta: float = 10_000.0,
) -> DecoderSpec:
    """What the Llama-like families have in common, and a family's own choices."""
    config.refuse_unless("hidden_act", "silu")
    config.refuse_unless("rope_interleaved", False)
    for part in (config, _rope_section(config)):
        part.refuse_unless("partial_rotary_factor", 1)
    hidden_size, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if head_dim is None:
        head_dim = config.integer("head_dim", hidden_size // max(num_heads, 1))
    max_positions = config.integer("max_position_embeddings")
    rope_theta, rope_scaling = _rope(config, default_theta)
    return DecoderSpec(
        family=family,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=config.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads") if kv_heads is None else kv_heads,
        head_dim=head_dim,
        norm=Norm.RMS,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        block=BlockForm.SEQUENTIAL,
        positions=Positions.ROTARY_HALVES,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        activation=Activation.SWIGLU,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        qk_norm=qk_norm,
        tied_embeddings=config.flag("tie_word_embeddings"),
        max_positions=max_positions if window is None else min(max_positions, window),
    )


def _even_share(hidden_size: int, num_heads: int) -> int:
    if num_heads < 1 or hidden_size % num_heads:
        raise CheckpointError(f"config.json: {num_heads} heads do not divide a hidden size of {hidden_size} evenly")
    return hidden_size // num_heads


def _rope(config: _ConfigReader, default_theta: float) -> tuple[float, RopeScaling | None]:
    """Base and scaling from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4)."""
    section = _rope_section(config)
    if section.has_sections():
        raise CheckpointError("config.json: rotary parameters that differ between layers are not supported")
    theta = section.number("rope_theta", config.number("rope_theta", default_theta))
    kind = section.get("rope_type") or section.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise CheckpointError(f"config.json: rope type {kind!r} is not supported; 'default' and 'llama3' are")
    return theta, RopeScaling(
        factor=section.number("factor"),
        low_freq_factor=section.number("low_freq_factor"),
        high_freq_factor=section.number("high_freq_factor"),
        original_max_positions=section.integer(
            "original_max_position_embeddings", config.integer("max_position_embeddings")
        ),
    )


def _rope_section(config: _ConfigReader) -> _ConfigReader:
    return config.section("rope_parameters") or config.section("rope_scaling") or _ConfigReader({})


def _mistral_window(config: _ConfigReader) -> int | None:
    # transformers reads null as "no window" and an absent key as the first Mistral's 4096.
    if config.has("sliding_window") and config.get("sliding_window") is None:
        return None
    return config.integer("sliding_window", 4096)


def _qwen_window(config: _ConfigReader) -> int | None:
    """The window if any layer slides; transformers derives those from `max_window_layers` unless `layer_types` says."""
    if not config.flag("use_sliding_window") or (config.has("sliding_window") and config.get("sliding_window") is None):
        return None
    layer_types = config.get("layer_types")
    if isinstance(layer_types, list):
        slides = "sliding_attention" in layer_types
    else:
        slides = config.integer("max_window_layers", 28) < config.integer("num_hidden_layers")
    return config.integer("sliding_window", 4096) if slides else None
