from __future__ import annotations

import copy
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from quant.errors import QuantizationError
from quant.int4_linear import QuantizedLinear
from quant.method.gptq import GptqOptions, HessianSum, output_error, quantize_matrix, round_to_nearest
from quant.options import LinearChoice
from quant.progress import SilentProgress
from quant.walk.quantize_model import LayerReport, quantize_layers
from serving.model.transformer import Decoder, DecoderLayer
from tests.quant.tiny_models import BLOOM, GPT_NEOX, PALM, tiny_decoder, tiny_ids

pytestmark = pytest.mark.unit

OPTIONS = GptqOptions(group_size=32)


class RecordingProgress:
    def __init__(self) -> None:
        self.updates: list[tuple[str, float, float]] = []

    def update(self, stage: str, done: float, total: float) -> None:
        self.updates.append((stage, done, total))


def walk(decoder: Decoder, ids: Tensor, options: GptqOptions = OPTIONS) -> list[LayerReport]:
    return quantize_layers(decoder, ids, options, SilentProgress(), dtype=torch.float32)


def layer_of(decoder: Decoder, index: int) -> DecoderLayer:
    return cast("DecoderLayer", decoder.layers[index])


FORMS = pytest.mark.parametrize(
    "form", [{}, PALM, BLOOM, GPT_NEOX], ids=["sequential", "parallel", "ungated", "parallel_own_norm"]
)


@FORMS
def test_every_linear_of_every_layer_is_replaced_and_reported(form: dict[str, object]) -> None:
    decoder = tiny_decoder(**form)
    linears = [module for module in decoder.layers.modules() if isinstance(module, nn.Linear)]
    reports = walk(decoder, tiny_ids(8, 64))
    quantized = [name for name, module in decoder.named_modules() if isinstance(module, QuantizedLinear)]
    assert sorted(linear.name for report in reports for linear in report.linears) == sorted(quantized)
    assert len(quantized) == len(linears)
    assert not any(isinstance(module, nn.Linear) for module in decoder.layers.modules())


@FORMS
def test_predictions_change_less_than_by_rounding_to_nearest(form: dict[str, object]) -> None:
    calibration, fresh = tiny_ids(32, 64), tiny_ids(4, 64, seed=9)
    source = tiny_decoder(**form)
    expected = source(fresh).detach()
    nearest = copy.deepcopy(source)
    for layer in nearest.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, attribute = name.rpartition(".")
                matrix = round_to_nearest(module.weight, replace(OPTIONS, range_search=False))
                setattr(layer.get_submodule(parent), attribute, QuantizedLinear(matrix))
    walk(source, calibration)
    with torch.inference_mode():
        found, rounded = source(fresh) - expected, nearest(fresh) - expected
    assert float(found.norm()) < 0.8 * float(rounded.norm())


@FORMS
@pytest.mark.parametrize("part", ["self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_later_linears_are_calibrated_on_what_the_quantised_earlier_ones_put_out(
    form: dict[str, object], part: str
) -> None:
    decoder = tiny_decoder(**form)
    ids = tiny_ids(8, 64)
    linear = cast("nn.Linear", copy.deepcopy(layer_of(decoder, 1).get_submodule(part)))
    walk(decoder, ids)
    captured: list[Tensor] = []
    quantized = layer_of(decoder, 1).get_submodule(part)
    handle = quantized.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    with torch.inference_mode():
        decoder(ids)
    handle.remove()
    hessian = HessianSum(linear.in_features)
    hessian.add(captured[0])
    expected = quantize_matrix(linear.weight, hessian.mean(), OPTIONS).matrix
    assert isinstance(quantized, QuantizedLinear)
    # The walk adds its Hessians up in another order.
    assert float((quantized.matrix.codes == expected.codes).float().mean()) > 0.98
    assert torch.equal(quantized.matrix.scales, expected.scales)


def test_reported_error_is_that_of_the_linear_on_its_calibration_inputs() -> None:
    decoder = tiny_decoder()
    ids = tiny_ids(8, 64)
    weight = cast("nn.Linear", layer_of(decoder, 0).self_attn.k_proj).weight.detach().clone()
    normed = layer_of(decoder, 0).input_layernorm(decoder.embed(ids)).detach()
    report = walk(decoder, ids)[0]
    quantized = layer_of(decoder, 0).self_attn.k_proj
    assert isinstance(quantized, QuantizedLinear)
    hessian = HessianSum(64)
    hessian.add(normed)
    error = next(linear.error for linear in report.linears if linear.name == "model.layers.0.self_attn.k_proj")
    assert error == pytest.approx(output_error(weight, quantized.matrix, hessian.mean()), rel=1e-3)


def test_biases_stay_as_they_are() -> None:
    decoder = tiny_decoder(attention_bias=True)
    before = cast("nn.Linear", layer_of(decoder, 0).self_attn.q_proj).bias.detach().clone()
    walk(decoder, tiny_ids(8, 64))
    after = cast("QuantizedLinear", layer_of(decoder, 0).self_attn.q_proj).bias
    assert after is not None
    assert torch.equal(after, before)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_walk_in_bf16_serves_any_stored_type(stored: torch.dtype) -> None:
    decoder = tiny_decoder().to(stored)
    reports = quantize_layers(decoder, tiny_ids(8, 64), OPTIONS, SilentProgress(), dtype=torch.bfloat16)
    assert all(0 < linear.error < 0.05 for report in reports for linear in report.linears)
    assert layer_of(decoder, 0).input_layernorm.weight.dtype == stored


def test_chosen_linears_can_have_other_bits() -> None:
    decoder = tiny_decoder()

    def choice(name: str) -> LinearChoice:
        return LinearChoice(8 if name.endswith(("down_proj", "v_proj")) else 4)

    reports = quantize_layers(decoder, tiny_ids(8, 64), OPTIONS, SilentProgress(), choice_of=choice)
    found = {linear.name.rpartition(".")[2]: linear.bits for linear in reports[0].linears}
    assert found == {"q_proj": 4, "k_proj": 4, "v_proj": 8, "o_proj": 4, "gate_proj": 4, "up_proj": 4, "down_proj": 8}


def test_progress_is_told_layer_by_layer() -> None:
    progress = RecordingProgress()
    quantize_layers(tiny_decoder(), tiny_ids(8, 64), OPTIONS, progress)
    assert [(done, total) for _, done, total in progress.updates] == [(0, 2), (1, 2), (2, 2)]


def test_group_size_that_does_not_divide_is_refused_before_any_work() -> None:
    decoder = tiny_decoder()
    with pytest.raises(QuantizationError, match=r"64 does not divide .*\[64, 96\]; these do: 32"):
        walk(decoder, tiny_ids(8, 64), replace(OPTIONS, group_size=64))
    assert isinstance(layer_of(decoder, 0).mlp.up_proj, nn.Linear)


def test_a_quantised_model_is_refused() -> None:
    decoder = tiny_decoder()
    walk(decoder, tiny_ids(8, 64))
    with pytest.raises(QuantizationError, match="quantised already"):
        walk(decoder, tiny_ids(8, 64))
