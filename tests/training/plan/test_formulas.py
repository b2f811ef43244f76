from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from training.plan import formulas
from training.sizes import SIZES, ModelSize, config_of, find_size

pytestmark = pytest.mark.unit

PALM = find_size("palm-2m")


@pytest.mark.parametrize("name", ["palm-2m", "llama-135m"])
def test_linear_and_adapter_parameters_are_those_of_the_built_model(name: str) -> None:
    size = find_size(name)
    values = config_of(size)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(str(values.pop("model_type")), **values))
    linears = [
        module for key, module in model.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in key
    ]
    assert formulas.linear_parameters(size) == sum(linear.weight.numel() for linear in linears)
    expected = sum(4 * (linear.in_features + linear.out_features) for linear in linears)
    assert formulas.adapter_parameters(size, 4) == expected


def test_full_training_keeps_16_bytes_a_parameter() -> None:
    state = (
        formulas.weight_bytes(PALM, "full", 16, compute_bytes=2)
        + formulas.gradient_bytes(PALM, "full", 16)
        + formulas.optimizer_bytes(PALM, "full", 16)
    )
    assert state == 16 * PALM.parameters


@pytest.mark.parametrize("size", SIZES.values(), ids=lambda size: size.name)
def test_each_method_keeps_less_than_the_one_before(size: ModelSize) -> None:
    kept = [formulas.weight_bytes(size, method, 8, compute_bytes=2) for method in ("full", "lora", "qlora")]
    assert kept == sorted(kept, reverse=True)


def test_checkpointing_keeps_one_residual_stream_a_layer() -> None:
    deep, shallow = (
        formulas.activation_bytes(replace(PALM, layers=layers), 10, compute_bytes=2, checkpointing=True)
        for layers in (5, 4)
    )
    assert deep - shallow == 10 * 4 * PALM.hidden


def test_operations_of_a_token_are_palms() -> None:
    """arXiv:2204.02311, appendix B, for 540B: 6 N + 12 layers heads head_dim length."""
    size = find_size("palm-540b")
    expected = 6 * size.parameters + 12 * 118 * 48 * 256 * 2048
    assert formulas.operations_per_token(size, 2048) == expected


def test_operations_are_those_that_torch_counts() -> None:
    """The forward pass is a third; torch counts 2 for each product and sum, and attention without its causal half."""
    from torch.utils.flop_counter import FlopCounterMode

    values = config_of(PALM)
    config = AutoConfig.for_model(str(values.pop("model_type")), **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        ids = torch.zeros(2, 64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    assert counter.get_total_flops() == pytest.approx(2 * 64 * formulas.operations_per_token(PALM, 64) / 3, rel=0.02)


def test_untied_embedding_is_not_multiplied_and_frozen_weights_need_no_gradient() -> None:
    size = find_size("llama-7b")
    multiplied = size.parameters - size.vocab * size.hidden
    assert formulas.operations_per_token(size, 0) == 6 * multiplied
    assert formulas.operations_per_token(size, 0, "lora") == 4 * multiplied


def test_cache_of_a_token_is_one_key_and_value_for_each_head() -> None:
    assert formulas.kv_bytes_per_token(find_size("llama-7b")) == 2 * 32 * 4096 * 2
    assert formulas.kv_bytes_per_token(find_size("palm-540b")) == 2 * 118 * 256 * 2


def test_quantised_weights_are_a_little_more_than_their_bits() -> None:
    size = find_size("llama-7b")
    four = formulas.served_weight_bytes(size, 4)
    outside = 2 * (size.parameters - formulas.linear_parameters(size))
    assert (four - outside) * 8 / formulas.linear_parameters(size) == pytest.approx(4 + 20 / 128)
    assert formulas.served_weight_bytes(size, 16) == 2 * size.parameters
