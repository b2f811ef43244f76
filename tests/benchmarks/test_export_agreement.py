"""What holds llama.cpp against us: its rounding is the format's own, and distances are between named pairs."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
import torch

from benchmarks.export_agreement import as_q8_0, compare, round_activations
from quant.int4_linear import QuantizedLinear
from quant.method.gptq import GptqOptions, round_to_nearest
from tests.quant.tiny_models import tiny_decoder, tiny_ids

pytestmark = pytest.mark.unit


def test_activations_are_rounded_to_what_the_format_holds() -> None:
    values = np.random.default_rng(0).normal(size=(3, 5, 64)).astype(np.float32)
    values[0, 0, :32] = 0
    rows = values.reshape(15, 64)
    held = gguf.dequantize(gguf.quantize(rows, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(as_q8_0(torch.from_numpy(values)).numpy().reshape(15, 64), held)


def test_only_linears_that_the_file_holds_as_codes_round_what_goes_into_them() -> None:
    ids = tiny_ids(1, 16)
    logits: list[torch.Tensor] = []
    for float16_bits in (None, (4,), ()):
        decoder = tiny_decoder()
        linear = decoder.get_submodule("model.layers.0.mlp.up_proj")
        assert isinstance(linear, torch.nn.Linear)
        matrix = round_to_nearest(linear.weight.detach(), GptqOptions(group_size=32))
        setattr(decoder.get_submodule("model.layers.0.mlp"), "up_proj", QuantizedLinear(matrix))  # noqa: B010
        if float16_bits is not None:
            round_activations(decoder, float16_bits)
        with torch.inference_mode():
            logits.append(decoder(ids))
    plain, left_alone, rounded = logits
    assert torch.equal(plain, left_alone)
    assert not torch.equal(plain, rounded)


def test_every_pair_of_sides_is_compared_by_name() -> None:
    """Two tokens of a vocabulary of two: one side is sure of the first word, one of neither."""
    sure, unsure = torch.tensor([[math.log(3.0), 0.0]] * 2), torch.tensor([[0.0, 0.1]] * 2)
    windows = torch.tensor([[0, 0], [1, 0]])
    distances, perplexities = compare({"a": lambda _: sure, "b": lambda _: unsure}, windows)
    assert list(distances) == ["a / b"]
    second = unsure[0].softmax(0).tolist()
    expected = 0.75 * math.log(0.75 / second[0]) + 0.25 * math.log(0.25 / second[1])
    assert distances["a / b"] == pytest.approx(
        {"mean_kl": expected, "kl_p99": expected, "top1_agreement": 0.0, "tokens": 4}, abs=1e-6
    )
    assert perplexities == pytest.approx({"a": 4 / 3, "b": 1 / second[0]})
