"""Every formula behind `causerie plan`, pure: bytes, floating-point operations, seconds. Sizes in, numbers out.

Sources
  [Z]  ZeRO, arXiv:1910.02054, section 3.1        16 bytes of model state for each parameter with Adam
  [A]  arXiv:2205.05198, section 4                activations kept for the backward pass, term by term
  [P]  PaLM, arXiv:2204.02311, appendix B         operations of a token, and model FLOPs utilisation (MFU)
  [Q]  QLoRA, arXiv:2305.14314, section 3         NF4 with double quantisation: 4.127 bits a weight
  [G]  GPTQ, arXiv:2210.17323                     4 bits and, for each group of 128, a 16-bit scale and a 4-bit zero
  [S]  arXiv:2211.05102, section 2                decoding is bound by the memory that a step reads
The terms of [A] are counted anew for the layers that transformers runs, gated ones among them, with attention that
never stores its scores. tests/training/plan/test_measured.py holds the sums against measured memory.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from training.sizes import ModelSize

Method: TypeAlias = Literal["full", "lora", "qlora"]
WeightBits: TypeAlias = Literal[4, 8, 16]

FLOAT32, BFLOAT16 = 4, 2
# AdamW keeps a mean and a mean square of each gradient.
ADAM_BYTES = 2 * FLOAT32
NF4_BITS = 4.127
GPTQ_GROUP = 128
# Logits of one pass are computed in parts of at most so many numbers (training.trunk).
MAX_LOGITS = 2**24
# Arrays as large as those logits at the widest point of their backward pass: themselves, and four on the way to theirs.
LOGIT_COPIES = 5
# Gradients of the widest arrays that a layer's backward pass holds at once: of gate, of up and of their product.
GRADIENT_COPIES = 3


# --- parameters ---


def linear_parameters(size: ModelSize) -> int:
    """Weights of the layers' linears: what is quantised, and what adapters stand on."""
    attention = 2 * size.hidden * (size.heads + size.kv_heads) * size.head_dim
    return size.layers * (attention + (3 if size.gated else 2) * size.hidden * size.intermediate)


def adapter_parameters(size: ModelSize, rank: int) -> int:
    """LoRA on every linear of a layer: `rank` columns for its inputs and `rank` rows for its outputs."""
    attention, kv = size.heads * size.head_dim, size.kv_heads * size.head_dim
    shapes = [(size.hidden, attention), (size.hidden, kv), (size.hidden, kv), (attention, size.hidden)]
    shapes += [(size.hidden, size.intermediate)] * (2 if size.gated else 1) + [(size.intermediate, size.hidden)]
    return size.layers * sum(rank * (inputs + outputs) for inputs, outputs in shapes)


def trained_parameters(size: ModelSize, method: Method, rank: int) -> int:
    return size.parameters if method == "full" else adapter_parameters(size, rank)


# --- memory of training, bytes ---


def frozen_weight_bytes(size: ModelSize, method: Method, *, compute_bytes: int) -> float:
    """The trunk under adapters: as the products read it, or its linears in NF4 [Q]."""
    if method == "full":
        return 0
    linear = linear_parameters(size) if method == "qlora" else 0
    return linear * NF4_BITS / 8 + compute_bytes * (size.parameters - linear)


def weight_bytes(size: ModelSize, method: Method, rank: int, *, compute_bytes: int) -> float:
    """Learning weights in float32, and the frozen ones."""
    frozen = frozen_weight_bytes(size, method, compute_bytes=compute_bytes)
    return FLOAT32 * trained_parameters(size, method, rank) + frozen


def gradient_bytes(size: ModelSize, method: Method, rank: int) -> float:
    return FLOAT32 * trained_parameters(size, method, rank)


def optimizer_bytes(size: ModelSize, method: Method, rank: int) -> float:
    """With weights and gradients this makes the 16 bytes of [Z]: 4 + 4 + 8."""
    return ADAM_BYTES * trained_parameters(size, method, rank)


def compute_copy_bytes(size: ModelSize, method: Method, *, compute_bytes: int, is_sharded: bool) -> float:
    """Weights as the products read them, beside the float32 ones.

    Sharded: the layer at work and the one that is fetched meanwhile, the embedding, which stays gathered, and the
    gradients of one layer and of the embedding before they are added up over the devices.
    """
    if is_sharded:
        outside = size.parameters - size.layers * size.layer_parameters
        gradients = size.layer_parameters + outside if method == "full" else 0
        return compute_bytes * (2 * size.layer_parameters + outside + gradients)
    return compute_bytes * size.parameters if method == "full" and compute_bytes != FLOAT32 else 0


def layer_activation_bytes(size: ModelSize, *, compute_bytes: int) -> float:
    """Kept for one token by one layer until its backward pass [A].

    norm:         the centred input twice and the normalised one (LayerNorm), or input and normalised one (RMS), in
                  float32; and its output, which in lower precision each linear that reads it casts for itself
    attention:    turned queries and keys, values, and the result that the output projection reads
    feed-forward: gate, its activation, up and their product; without a gate, input and output of the activation
    """
    readers = 5 if size.gated else 4
    outputs = compute_bytes * (readers if compute_bytes != FLOAT32 else 1 if size.parallel else 2)
    norms = (3 * FLOAT32 if size.parallel else 2 * 2 * FLOAT32) * size.hidden + outputs * size.hidden
    attention = 2 * (size.heads + size.kv_heads) * size.head_dim
    feed_forward = (4 if size.gated else 2) * size.intermediate
    return norms + compute_bytes * (attention + feed_forward)


def activation_bytes(size: ModelSize, tokens: int, *, compute_bytes: int, checkpointing: bool) -> float:
    """Kept through the forward pass of `tokens` tokens on one device.

    checkpointing: of each layer only its input, the float32 residual stream; the rest is computed again.
    """
    final_norm = 4 * FLOAT32 * size.hidden
    of_layer = FLOAT32 * size.hidden if checkpointing else layer_activation_bytes(size, compute_bytes=compute_bytes)
    return tokens * (size.layers * of_layer + final_norm)


def backward_bytes(size: ModelSize, tokens: int, *, compute_bytes: int, checkpointing: bool) -> float:
    """Held for a moment on top: by the logits, or by a layer's backward pass (after its forward, if that is redone)."""
    logits = LOGIT_COPIES * FLOAT32 * min(tokens * size.vocab, MAX_LOGITS)
    layer = GRADIENT_COPIES * compute_bytes * size.intermediate * tokens
    if checkpointing:
        layer += tokens * layer_activation_bytes(size, compute_bytes=compute_bytes)
    return max(logits, layer)


# --- operations and time of training ---


def operations_per_token(size: ModelSize, length: int, method: Method = "full") -> float:
    """Forward and backward pass of one token in a row of `length` [P]: 6 N + 12 layers heads head_dim length.

    An untied embedding is looked up and not multiplied. Frozen weights need no gradient of their own: 4 N.
    Recomputed activations do not count: MFU is about the model's operations.
    """
    multiplied = size.parameters - (0 if size.tied else size.embedding_parameters)
    attention = 12 * size.layers * size.heads * size.head_dim * length
    return (6 if method == "full" else 4) * multiplied + attention


def training_seconds(operations: float, devices: int, peak: float, mfu: float) -> float:
    """peak: operations a second of one device at its best."""
    return operations / (devices * peak * mfu)


def traffic_bytes(size: ModelSize, method: Method, *, compute_bytes: int) -> float:
    """What one device sends in a pass when weights are sharded ([Z], section 7.2).

    Weights are gathered for the forward and for the backward pass, and gradients are added up in float32.
    """
    gathered = 2 * compute_bytes * size.parameters
    return gathered + (FLOAT32 * size.parameters if method == "full" else 0)


def network_seconds(tokens: float, tokens_of_pass: int, sent: float, bandwidth: float) -> float:
    """All passes over `tokens` tokens. tokens_of_pass: of all devices together; sent: bytes of one device in a pass."""
    return tokens / tokens_of_pass * sent / bandwidth


# --- memory and speed of serving ---


def served_weight_bytes(size: ModelSize, bits: WeightBits) -> float:
    """Quantised linears with their groups' scales and zeros [G]; embedding, head and norms stay in 16 bits."""
    if bits == 16:
        return BFLOAT16 * size.parameters
    linear = linear_parameters(size)
    return linear * (bits + (16 + bits) / GPTQ_GROUP) / 8 + BFLOAT16 * (size.parameters - linear)


def kv_bytes_per_token(size: ModelSize, cache_bytes: int = BFLOAT16) -> int:
    """A key and a value for each layer and key/value head."""
    return 2 * size.layers * size.kv_heads * size.head_dim * cache_bytes


def decode_step_seconds(read_bytes: float, devices: int, bandwidth: float, share: float) -> float:
    """One token for every sequence of the batch: weights and the batch's cache are read once [S].

    bandwidth: bytes a second of one device; share: what is reached of it
    """
    return read_bytes / (devices * bandwidth * share)
