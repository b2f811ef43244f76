"""Tiny random decoders with every option of the served form switched on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from quant.int4_linear import QuantizedLinear
from quant.method.gptq import GptqOptions, round_to_nearest
from serving.model.spec import Activation, BlockForm, DecoderSpec, Norm, Positions
from serving.model.transformer import Decoder

EOS = 1
SPEC = DecoderSpec(
    family="test",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    norm=Norm.RMS,
    norm_eps=1e-5,
    block=BlockForm.SEQUENTIAL,
    positions=Positions.ROTARY_HALVES,
    rope_theta=10000.0,
    rope_scaling=None,
    activation=Activation.SWIGLU,
    qkv_bias=True,
    out_bias=False,
    qk_norm=True,
    tied_embeddings=False,
    max_positions=256,
)


PALM_SPEC = replace(
    SPEC,
    num_kv_heads=1,
    norm=Norm.LAYER,
    block=BlockForm.PARALLEL,
    positions=Positions.ROTARY_INTERLEAVED,
    qkv_bias=False,
    qk_norm=False,
    tied_embeddings=True,
    logit_scale=0.4,
)


# With six heads, so that ALiBi's slopes lie between two powers of two.
BLOOM_SPEC = replace(
    SPEC,
    hidden_size=48,
    num_heads=6,
    num_kv_heads=6,
    norm=Norm.LAYER_WITH_BIAS,
    positions=Positions.ALIBI,
    activation=Activation.GELU_TANH,
    out_bias=True,
    qk_norm=False,
    tied_embeddings=True,
    mlp_bias=True,
    embedding_norm=True,
)
NEOX_SPEC = replace(
    SPEC,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    norm=Norm.LAYER_WITH_BIAS,
    block=BlockForm.PARALLEL_TWO_NORMS,
    rotary_dims=4,
    activation=Activation.GELU,
    out_bias=True,
    qk_norm=False,
    mlp_bias=True,
)


# What the native step computes: biases, norms of q and k, and key heads shared by three query heads.
NATIVE_SPEC = replace(
    SPEC, vocab_size=256, hidden_size=64, intermediate_size=96, num_heads=6, num_kv_heads=2, head_dim=32,
    max_positions=512, out_bias=True,
)  # fmt: skip


def make_decoder(spec: DecoderSpec = SPEC) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(spec)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return decoder.eval()


def quantized_decoder(spec: DecoderSpec, *, bits: int = 8, group_size: int = 32) -> Decoder:
    decoder = make_decoder(spec)
    for name, module in list(decoder.model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, attribute = name.rpartition(".")
            matrix = round_to_nearest(module.weight, GptqOptions(bits=bits, group_size=group_size, range_search=False))
            setattr(decoder.model.get_submodule(parent), attribute, QuantizedLinear(matrix, module.bias))
    return decoder


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(2, SPEC.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
