"""What GGUF calls the models of this project: architectures, tensors and hyperparameters, for reading and writing.

One record per architecture; what differs between them is in the record, so nothing else asks for a name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quant.errors import CheckpointError

TOP_LEVEL_NAMES: Final[Mapping[str, str]] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES: Final[Mapping[str, str]] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEAD_NORM_NAMES: Final[Mapping[str, str]] = {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
# Not a weight: what the rotary frequencies are divided by, (head_dim / 2,) float32.
ROPE_FACTORS: Final = "rope_freqs.weight"
_GGUF_NAME: Final = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>[a-z_]+)\.(?P<kind>weight|bias)")
_MODEL_NAME: Final = re.compile(r"(?:model\.layers\.(?P<layer>\d+)\.)?(?P<part>[a-z_.]+)\.(?P<kind>weight|bias)")


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """`name` is GGUF's architecture; `architecture` and `model_type` are config.json's.

    interleaves_rotary:  the rows of q and k lie in the file with the halves of each head's rotary dimensions
                         interleaved, and in the model do not
    epsilon:             the norms' epsilon, by GGUF's name and by config.json's
    is_parallel:         attention and feed-forward read one norm
    default_logit_scale: what a config that names none multiplies the logits by; None where nothing is multiplied
    """

    name: str
    architecture: str
    model_type: str
    interleaves_rotary: bool = False
    head_norms: bool = False
    epsilon: tuple[str, str] = ("layer_norm_rms_epsilon", "rms_norm_eps")
    is_parallel: bool = False
    is_always_tied: bool = False
    has_biases: bool = True
    default_epsilon: float = 1e-6
    default_rope_theta: float = 10_000.0
    default_logit_scale: float | None = None

    @property
    def layer_names(self) -> Mapping[str, str]:
        names = {**LAYER_NAMES, **HEAD_NORM_NAMES} if self.head_norms else dict(LAYER_NAMES)
        if self.is_parallel:
            del names["ffn_norm"]
        return names

    def model_name(self, name: str) -> str | None:
        """Hugging Face's name of a tensor that GGUF calls `name`; None if such a model has no such tensor."""
        match = _GGUF_NAME.fullmatch(name)
        if match is None:
            return None
        layer = match["layer"]
        renamed = (TOP_LEVEL_NAMES if layer is None else self.layer_names).get(match["part"])
        if renamed is None:
            return None
        return f"{'' if layer is None else f'model.layers.{int(layer)}.'}{renamed}.{match['kind']}"

    def gguf_name(self, name: str) -> str | None:
        """The inverse of `model_name`."""
        match = _MODEL_NAME.fullmatch(name)
        if match is None:
            return None
        layer = match["layer"]
        names = TOP_LEVEL_NAMES if layer is None else self.layer_names
        part = next((ours for ours, theirs in names.items() if theirs == match["part"]), None)
        return None if part is None else f"{'' if layer is None else f'blk.{layer}.'}{part}.{match['kind']}"

    def rotary_heads(self, name: str, num_heads: int, num_kv_heads: int) -> int | None:
        """How many heads share the rows of the tensor `name` (of Hugging Face) that lie interleaved; None if none do.

        Norms of single heads hold no rows of heads.
        """
        if not self.interleaves_rotary:
            return None
        return {"q_proj": num_heads, "k_proj": num_kv_heads}.get(name.split(".")[-2])


FAMILIES: Final = (
    GgufFamily("llama", "LlamaForCausalLM", "llama", interleaves_rotary=True),
    # llama.cpp has no architecture of its own for it.
    GgufFamily("llama", "MistralForCausalLM", "mistral", interleaves_rotary=True),
    GgufFamily("qwen2", "Qwen2ForCausalLM", "qwen2"),
    GgufFamily("qwen3", "Qwen3ForCausalLM", "qwen3", head_norms=True),
    # PaLM among them. Both sides interleave its rotary dimensions.
    GgufFamily(
        "command-r",
        "CohereForCausalLM",
        "cohere",
        epsilon=("layer_norm_epsilon", "layer_norm_eps"),
        is_parallel=True,
        is_always_tied=True,
        has_biases=False,
        default_epsilon=1e-5,
        default_rope_theta=500_000.0,
        default_logit_scale=0.0625,
    ),
)


def family_of_gguf(name: str, origin: str) -> GgufFamily:
    """By GGUF's architecture. CheckpointError, naming `origin`, for one that is not known."""
    for family in FAMILIES:
        if family.name == name:
            return family
    known = ", ".join(dict.fromkeys(family.name for family in FAMILIES))
    raise CheckpointError(
        f"{origin} has the architecture {name!r}; GGUF files are converted for {known}: "
        "use the model's safetensors directory instead"
    )


def family_of_config(config: Mapping[str, object], origin: str) -> GgufFamily:
    """By config.json's architectures. CheckpointError, naming `origin`, for one that cannot be written."""
    found = config.get("architectures")
    names = [str(name) for name in found] if isinstance(found, list) else []
    for family in FAMILIES:
        if family.architecture in names:
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise CheckpointError(
        f"{origin} is a {', '.join(names) or 'model without a named architecture'}; GGUF is written for {known}"
    )


def llama3_rope_factors(
    head_dim: int,
    theta: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_positions: int,
) -> NDArray[np.float32]:
    """What Llama 3's scaling divides each rotary frequency by: 1 for fast ones, `factor` for slow ones, between them a
    blend. Returns (head_dim / 2,) float32."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    wavelengths = np.float32(2 * math.pi) / frequencies.astype(np.float32)
    blend = (original_positions / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 / ((1 - blend) / factor + blend)).astype(np.float32)
