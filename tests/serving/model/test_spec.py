from __future__ import annotations

from typing import Any

import pytest

from quant.errors import CheckpointError
from serving.model.spec import Activation, BlockForm, Norm, Positions, RopeScaling, spec_from_config

pytestmark = pytest.mark.unit


def config(architecture: str = "LlamaForCausalLM", **changes: object) -> dict[str, Any]:
    values: dict[str, Any] = {
        "architectures": [architecture],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        **changes,
    }
    return {key: value for key, value in values.items() if value is not ...}


SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}


def test_both_generations_of_rotary_settings_are_read_alike() -> None:
    old = spec_from_config(config(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **SCALING}))
    new = spec_from_config(config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **SCALING}))

    assert old == new
    assert old.rope_theta == 5e5
    assert old.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 1024)


def test_absent_and_null_rotary_settings_mean_plain_ones() -> None:
    assert spec_from_config(config()) == spec_from_config(config(rope_scaling=None, rope_theta=10000.0))
    assert spec_from_config(config(rope_scaling={"type": "default"})).rope_scaling is None


def test_an_unsupported_architecture_is_refused_with_those_supported() -> None:
    with pytest.raises(
        CheckpointError, match=r"MambaForCausalLM.*Bloom.*Cohere.*GPTNeoX.*LlamaFor.*Mistral.*Qwen2.*Qwen3"
    ):
        spec_from_config(config("MambaForCausalLM"))
    with pytest.raises(CheckpointError, match="none named"):
        spec_from_config(config(architectures=...))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ between layers"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"vocab_size": ...}, "vocab_size must be a whole number; found None"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number; found '64'"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"num_hidden_layers": 0}, "num_layers must be positive"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"rms_norm_eps": True}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"rope_scaling": "llama3"}, "rope_scaling must be an object"),
    ],
)
def test_options_that_would_change_the_logits_are_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        spec_from_config(config("LlamaForCausalLM", **changes))


@pytest.mark.parametrize(
    ("architecture", "changes", "max_positions"),
    [
        ("MistralForCausalLM", {"sliding_window": 1000}, 1000),
        ("MistralForCausalLM", {"sliding_window": None}, 8192),
        ("MistralForCausalLM", {}, 4096),
        ("Qwen2ForCausalLM", {"sliding_window": 1000}, 8192),
        ("Qwen2ForCausalLM", {"sliding_window": 1000, "use_sliding_window": True, "max_window_layers": 1}, 1000),
        ("Qwen2ForCausalLM", {"sliding_window": 1000, "use_sliding_window": True, "max_window_layers": 2}, 8192),
        ("Qwen3ForCausalLM", {"use_sliding_window": True, "layer_types": ["full_attention"] * 2}, 8192),
        ("Qwen3ForCausalLM", {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 4096),
        ("LlamaForCausalLM", {"sliding_window": 1000}, 8192),
    ],
)
def test_context_ends_where_a_window_would_begin_to_matter(
    architecture: str, changes: dict[str, object], max_positions: int
) -> None:
    assert spec_from_config(config(architecture, **changes)).max_positions == max_positions


def test_head_size_and_key_value_heads_default_as_in_transformers() -> None:
    llama = spec_from_config(config(num_key_value_heads=...))
    assert (llama.num_kv_heads, llama.head_dim) == (4, 16)
    assert spec_from_config(config("Qwen3ForCausalLM")).head_dim == 128
    assert spec_from_config(config(head_dim=32)).head_dim == 32


def test_cohere_is_palms_form_with_transformers_defaults() -> None:
    spec = spec_from_config(config("CohereForCausalLM", num_key_value_heads=1))
    assert (spec.norm, spec.block, spec.positions) == (Norm.LAYER, BlockForm.PARALLEL, Positions.ROTARY_INTERLEAVED)
    assert (spec.norm_eps, spec.rope_theta, spec.logit_scale) == (1e-5, 500_000.0, 0.0625)
    assert (spec.num_kv_heads, spec.tied_embeddings, spec.qkv_bias) == (1, True, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_qk_norm": True}, "use_qk_norm = True is not supported"),
        ({"logit_scale": 0}, "logit_scale must be a positive number; found 0.0"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ],
)
def test_cohere_options_that_are_not_implemented_are_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        spec_from_config(config("CohereForCausalLM", **changes))


def bloom_config(**changes: object) -> dict[str, Any]:
    values = config("BloomForCausalLM", n_layer=2, n_head=4, **changes)
    kept = ("architectures", "vocab_size", "hidden_size", "n_layer", "n_head", *changes)
    return {key: value for key, value in values.items() if key in kept}


def neox_config(**changes: object) -> dict[str, Any]:
    return config("GPTNeoXForCausalLM", num_key_value_heads=..., **changes)


def test_bloom_has_transformers_defaults() -> None:
    spec = spec_from_config(bloom_config())
    assert (spec.norm, spec.block, spec.positions) == (Norm.LAYER_WITH_BIAS, BlockForm.SEQUENTIAL, Positions.ALIBI)
    assert (spec.activation, spec.intermediate_size, spec.norm_eps) == (Activation.GELU_TANH, 256, 1e-5)
    assert (spec.qkv_bias, spec.out_bias, spec.mlp_bias, spec.embedding_norm) == (True, True, True, True)
    assert (spec.num_turned, spec.num_kv_heads, spec.tied_embeddings) == (0, 4, True)


def test_blooms_older_key_names_are_read_alike() -> None:
    older = bloom_config(n_embed=64, num_hidden_layers=2, num_attention_heads=4)
    for key in ("hidden_size", "n_layer", "n_head"):
        del older[key]
    assert spec_from_config(older) == spec_from_config(bloom_config())


def test_blooms_context_is_what_it_was_trained_with() -> None:
    assert spec_from_config(bloom_config()).max_positions == 2048
    assert spec_from_config(bloom_config(seq_length=4096)).max_positions == 4096


def test_gpt_neox_has_transformers_defaults() -> None:
    spec = spec_from_config(neox_config())
    assert (spec.norm, spec.positions) == (Norm.LAYER_WITH_BIAS, Positions.ROTARY_HALVES)
    assert (spec.block, spec.activation) == (BlockForm.PARALLEL_TWO_NORMS, Activation.GELU)
    assert (spec.num_turned, spec.rope_theta, spec.norm_eps) == (4, 10_000.0, 1e-5)
    assert (spec.qkv_bias, spec.mlp_bias, spec.embedding_norm, spec.tied_embeddings) == (True, True, False, False)


def test_both_generations_of_gpt_neox_rotary_settings_are_read_alike() -> None:
    old = spec_from_config(neox_config(rotary_pct=0.5, rotary_emb_base=500))
    new = spec_from_config(neox_config(rope_parameters={"partial_rotary_factor": 0.5, "rope_theta": 500}))
    assert old == new
    assert (old.num_turned, old.rope_theta) == (8, 500.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (bloom_config(apply_residual_connection_post_layernorm=True), "post_layernorm = True is not supported"),
        (bloom_config(hidden_size=63), "4 heads do not divide a hidden size of 63 evenly"),
        (neox_config(hidden_size=66), "4 heads do not divide a hidden size of 66 evenly"),
        (neox_config(hidden_act="relu"), "hidden_act = 'relu' is not supported; gelu"),
        (neox_config(rotary_pct=0.2), r"rotary dimensions must be an even number up to head_dim \(16\); found 3"),
        (neox_config(rotary_pct=2), "found 32"),
        (neox_config(rope_scaling={"rope_type": "llama3", **SCALING}), "scaled rotary positions are not supported"),
    ],
)
def test_options_of_other_families_that_are_not_implemented_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        spec_from_config(values)
