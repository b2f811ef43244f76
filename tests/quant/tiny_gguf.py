"""Small GGUF files written by the `gguf` package: the reference for our reader, and models to convert."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as GgmlType
from tokenizers.pre_tokenizers import ByteLevel

HIDDEN, HEADS, KV_HEADS, FEED_FORWARD, HEAD_DIM = 64, 4, 2, 96, 16


def write_file(path: Path, fill: Callable[[gguf.GGUFWriter], None]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permute_rows(values: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: the inverse of what is tested."""
    halves = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def byte_level_tokens() -> list[str]:
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "he", "ll", "hell", "12"]


def llama_weights() -> dict[str, np.ndarray]:
    """A one-layer model under Hugging Face's names."""
    rng = np.random.default_rng(7)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0, 0.05, (rows, columns)).astype(np.float32)

    layer = "model.layers.0."
    return {
        "model.embed_tokens.weight": matrix(len(byte_level_tokens()), HIDDEN),
        layer + "input_layernorm.weight": rng.normal(1, 0.1, HIDDEN).astype(np.float32),
        layer + "self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
        layer + "self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
        layer + "self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
        layer + "self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
        layer + "post_attention_layernorm.weight": rng.normal(1, 0.1, HIDDEN).astype(np.float32),
        layer + "mlp.gate_proj.weight": matrix(FEED_FORWARD, HIDDEN),
        layer + "mlp.up_proj.weight": matrix(FEED_FORWARD, HIDDEN),
        layer + "mlp.down_proj.weight": matrix(HIDDEN, FEED_FORWARD),
        "model.norm.weight": rng.normal(1, 0.1, HIDDEN).astype(np.float32),
    }


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def write_llama(path: Path, kind: GgmlType, change: Callable[[gguf.GGUFWriter], None] | None = None) -> Path:
    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(1)
        writer.add_context_length(128)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(FEED_FORWARD)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_rope_freq_base(10000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        tokens = byte_level_tokens()
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
        writer.add_token_merges(["h e", "l l", "he ll", "1 2"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template("{{ messages[0]['content'] }}")
        for name, values in llama_weights().items():
            part = name.removesuffix(".weight").removeprefix("model.layers.0.").split(".", maxsplit=1)[-1]
            part = name.removesuffix(".weight") if not name.startswith("model.layers") else part
            prefix = "blk.0." if name.startswith("model.layers") else ""
            if part in ("q_proj", "k_proj"):
                values = permute_rows(values, HEADS if part == "q_proj" else KV_HEADS)
            stored = values if values.ndim == 1 else gguf.quantize(values, kind)
            raw_dtype = GgmlType.F32 if values.ndim == 1 else kind
            writer.add_tensor(f"{prefix}{GGUF_NAMES[part]}.weight", stored, raw_dtype=raw_dtype)
        if change is not None:
            change(writer)

    return write_file(path, fill)
