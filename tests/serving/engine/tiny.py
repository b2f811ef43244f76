"""A tiny random decoder with every option of the served form switched on."""

from __future__ import annotations

from dataclasses import replace

import torch

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


def make_decoder(spec: DecoderSpec = SPEC) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(spec)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return decoder.eval()


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(2, SPEC.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
