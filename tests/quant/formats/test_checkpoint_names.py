"""Names and rows of fused linears, against layouts written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.errors import CheckpointError
from quant.formats.checkpoint_names import CheckpointNames, StoredName, checkpoint_names
from quant.method.gptq import GptqOptions, round_to_nearest
from quant.method.matrix import QuantizedMatrix

pytestmark = pytest.mark.unit

BLOOM = checkpoint_names({"architectures": ["BloomForCausalLM"], "hidden_size": 8, "n_head": 2})
NEOX = checkpoint_names({"architectures": ["GPTNeoXForCausalLM"], "hidden_size": 8, "num_attention_heads": 2})
LLAMA = checkpoint_names({"architectures": ["LlamaForCausalLM"]})
both = pytest.mark.parametrize("names", [BLOOM, NEOX], ids=["bloom", "gpt_neox"])
ATTENTION = "model.layers.11.self_attn."
QKV = [ATTENTION + name for name in ("q_proj", "k_proj", "v_proj")]


def matrix_of(weight: Tensor, *, bits: int = 4, group_size: int = 32) -> QuantizedMatrix:
    return round_to_nearest(weight, GptqOptions(bits=bits, group_size=group_size, range_search=False))


def random_matrix(rows: int, *, seed: int = 0, bits: int = 4) -> QuantizedMatrix:
    return matrix_of(torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)), bits=bits)


@pytest.mark.parametrize(
    ("names", "stored", "ours"),
    [
        (BLOOM, "transformer.word_embeddings.weight", "model.embed_tokens.weight"),
        (BLOOM, "transformer.word_embeddings_layernorm.bias", "model.embed_norm.bias"),
        (BLOOM, "transformer.h.3.mlp.dense_h_to_4h.qweight", "model.layers.3.mlp.up_proj.qweight"),
        (BLOOM, "transformer.h.30.self_attention.dense", "model.layers.30.self_attn.o_proj"),
        (BLOOM, "transformer.ln_f.bias", "model.norm.bias"),
        (NEOX, "gpt_neox.embed_in.weight", "model.embed_tokens.weight"),
        (NEOX, "gpt_neox.layers.0.mlp.dense_4h_to_h.g_idx", "model.layers.0.mlp.down_proj.g_idx"),
        (NEOX, "embed_out.weight", "lm_head.weight"),
        (LLAMA, "model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
    ],
)
def test_a_name_on_disk_and_ours_are_translated_both_ways(names: CheckpointNames, stored: str, ours: str) -> None:
    assert names.ours(stored) == (ours,)
    assert names.stored(ours) == StoredName(stored, None)


def test_a_fused_linear_has_three_of_our_names() -> None:
    stored = "transformer.h.11.self_attention.query_key_value.bias"
    assert BLOOM.ours(stored) == tuple(f"{name}.bias" for name in QKV)
    assert [BLOOM.stored(f"{name}.bias") for name in QKV] == [StoredName(stored, part) for part in range(3)]


def test_a_name_that_was_read_without_its_prefix_is_written_with_it() -> None:
    assert BLOOM.ours("h.0.mlp.dense_4h_to_h.weight") == ("model.layers.0.mlp.down_proj.weight",)
    assert BLOOM.standard("h.0.mlp.dense_4h_to_h.weight") == "transformer.h.0.mlp.dense_4h_to_h.weight"
    assert BLOOM.standard("transformer.h.0.mlp.dense_4h_to_h.weight") == "transformer.h.0.mlp.dense_4h_to_h.weight"
    assert NEOX.standard("lm_head.weight") == "embed_out.weight"


def test_names_that_a_family_lacks_stay_as_they_are() -> None:
    for name in ("transformer.h.0.self_attention.rotary.weight", "score.weight", "h", ""):
        assert BLOOM.ours(name) == (name,)


def test_only_gpt_neox_has_a_mask_stored_as_bias() -> None:
    assert NEOX.is_derived("gpt_neox.layers.0.attention.bias")
    assert not NEOX.is_derived("gpt_neox.layers.0.attention.dense.bias")
    assert not BLOOM.is_derived("transformer.h.0.self_attention.dense.bias")


@both
def test_rows_lie_by_head_then_query_key_value(names: CheckpointNames) -> None:
    """Two heads of four dimensions: q0 q0 q0 q0 k0 ... v0 ... q1 ..."""
    fused = torch.tensor([100.0 * head + 10 * part + i for head in range(2) for part in range(3) for i in range(4)])
    for part in range(3):
        found = names.take_part(fused, part)
        assert found.tolist() == [100.0 * head + 10 * part + i for head in range(2) for i in range(4)]
    assert torch.equal(names.fuse([names.take_part(fused, part) for part in range(3)]), fused)


@both
def test_splitting_a_quantised_linear_changes_no_weight(names: CheckpointNames) -> None:
    fused = random_matrix(24)
    (stored,) = {names.stored(name).name for name in QKV}
    parts = names.split_matrix(stored, fused)
    assert [name for name, _ in parts] == QKV
    for part, (_, matrix) in enumerate(parts):
        assert torch.equal(matrix.dequantize(), names.take_part(fused.dequantize(), part))
    joined = names.fuse_matrices(dict(parts))
    assert list(joined) == [stored]
    assert torch.equal(joined[stored].dequantize(), fused.dequantize())
    assert torch.equal(joined[stored].codes, fused.codes)


@both
def test_parts_of_one_linear_must_share_its_grid(names: CheckpointNames) -> None:
    matrices = {name: random_matrix(8, seed=seed) for seed, name in enumerate(QKV)}
    with pytest.raises(CheckpointError, match=r"query_key_value joins q, k and v.*4 bits .* and 8 bits .* same bits"):
        names.fuse_matrices({**matrices, QKV[1]: random_matrix(8, bits=8)})
    with pytest.raises(CheckpointError, match=r"v_proj is missing"):
        names.fuse_matrices({name: matrices[name] for name in QKV[:2]})


def test_llamas_linears_are_neither_fused_nor_renamed() -> None:
    matrices = {name: random_matrix(8, bits=bits) for name, bits in zip(QKV, (4, 8, 4), strict=True)}
    assert LLAMA.fuse_matrices(matrices) == matrices


def test_rows_and_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CheckpointError, match="23 rows; a multiple of 3 x 4"):
        BLOOM.take_part(torch.zeros(23, 2), 0)
    with pytest.raises(CheckpointError, match="n_head or num_attention_heads must be a positive whole number"):
        checkpoint_names({"architectures": ["BloomForCausalLM"], "hidden_size": 8, "n_head": 0})
