"""GPTQ files of BLOOM and GPT-NeoX: as other tools write them, and as `causerie quantize` does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant.formats.autogptq import pack_linear
from quant.int4_linear import QuantizedLinear
from quant.method.gptq import GptqOptions, round_to_nearest
from serving.engine.logits import serving_logits
from serving.engine.prepare import prepare
from serving.model.weights import load_decoder
from tests.serving.model.checkpoints import build_model, edit_config, random_ids, save_model

pytestmark = pytest.mark.unit

GROUP_SIZE = 16
OPTIONS = GptqOptions(bits=4, group_size=GROUP_SIZE, range_search=False)
FAMILIES = ["bloom", "gpt_neox", "gpt_neox_sequential", "palm"]
LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "_proj")


def quantize_as_other_tools_do(model: PreTrainedModel, directory: Path) -> None:
    """Every linear of the layers packed whole, under its own name; the model gets the weights that were packed."""
    save_model(model, directory)
    tensors = load_file(directory / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(LINEARS):
            matrix = round_to_nearest(module.weight, OPTIONS)
            module.weight = nn.Parameter(matrix.dequantize())
            del tensors[f"{name}.weight"]
            tensors.update({f"{name}.{part}": tensor for part, tensor in pack_linear(matrix).items()})
    save_file(tensors, directory / "model.safetensors")
    edit_config(directory, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": GROUP_SIZE})


def largest_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gptq_file_of_another_tool_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model = build_model(name)
    quantize_as_other_tools_do(model, tmp_path)
    ids = random_ids(batch=1)

    decoder = load_decoder(tmp_path)

    quantized = [name for name, module in decoder.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(quantized) == 3 * (7 if name == "palm" else 6)
    with torch.no_grad():
        expected = model(ids).logits
        assert largest_difference(decoder(ids), expected) < 1e-4
    found = serving_logits(prepare(decoder, exact=True), ids[0], chunk_tokens=16)
    assert largest_difference(found, expected[0]) < 1e-4


def test_two_heads_exchanged_in_a_fused_linear_are_noticed(tmp_path: Path) -> None:
    model = build_model("bloom")
    quantize_as_other_tools_do(model, tmp_path)
    name = "transformer.h.1.self_attention.query_key_value.qweight"
    tensors = load_file(tmp_path / "model.safetensors")
    by_head = tensors[name].unflatten(1, (6, -1))
    tensors[name] = by_head[:, [1, 0, 2, 3, 4, 5]].flatten(1).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert largest_difference(load_decoder(tmp_path)(random_ids()), model(random_ids()).logits) > 0.1
