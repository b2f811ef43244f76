"""AutoGPTQ's tensors against words packed by hand, and three readers of them against each other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quant.errors import CheckpointError
from quant.formats.autogptq import (
    CheckpointFormat,
    GptqSettings,
    gptq_settings,
    is_packed_tensor,
    pack_linear,
    parse_settings,
    read_quantized_linears,
    unpack_linear,
)
from quant.formats.autogptq_check import weight_from_words
from quant.method.gptq import GptqOptions, quantize_matrix
from quant.method.matrix import QuantizedMatrix

pytestmark = pytest.mark.unit

V1 = GptqSettings(bits=4, group_size=32, checkpoint_format=CheckpointFormat.V1)
V2 = GptqSettings(bits=4, group_size=32, checkpoint_format=CheckpointFormat.V2)


def random_matrix(bits: int = 4, seed: int = 0) -> QuantizedMatrix:
    generator = torch.Generator().manual_seed(seed)
    top = 1 << bits
    return QuantizedMatrix(
        codes=torch.randint(0, top, (24, 64), dtype=torch.uint8, generator=generator),
        scales=(torch.rand((24, 2), generator=generator) + 0.1).to(torch.float16).to(torch.float32),
        zeros=torch.randint(1, top, (24, 2), dtype=torch.uint8, generator=generator),
        bits=bits,
        group_size=32,
    )


def independent_weight(tensors: dict[str, Tensor], zero_offset: int = 1) -> Tensor:
    words, zeros, scales, g_idx = (tensors[name].numpy() for name in ("qweight", "qzeros", "scales", "g_idx"))
    return torch.from_numpy(weight_from_words(words, zeros, scales, g_idx, zero_offset=zero_offset))


def test_words_packed_by_hand() -> None:
    matrix = QuantizedMatrix(
        codes=torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8).repeat(8, 1),
        scales=torch.full((8, 1), 0.25),
        zeros=torch.tensor([[1], [2], [3], [4], [5], [6], [7], [15]], dtype=torch.uint8),
        bits=4,
        group_size=8,
    )
    tensors = pack_linear(matrix)
    # Inputs along the word, one column for each output.
    assert tensors["qweight"].tolist() == [[0x87654321 - 2**32] * 8]
    # Outputs along the word, each zero point stored minus one: 0, 1, 2, 3, 4, 5, 6, 14.
    assert tensors["qzeros"].tolist() == [[0xE6543210 - 2**32]]
    assert tensors["scales"].dtype == torch.float16
    assert tensors["scales"].tolist() == [[0.25] * 8]
    assert tensors["g_idx"].tolist() == [0] * 8


def test_eight_bit_words_packed_by_hand() -> None:
    matrix = QuantizedMatrix(
        codes=torch.tensor([[1, 2, 3, 255]], dtype=torch.uint8).repeat(4, 1),
        scales=torch.full((4, 1), 0.25),
        zeros=torch.tensor([[1], [2], [128], [255]], dtype=torch.uint8),
        bits=8,
        group_size=4,
    )
    first, second = pack_linear(matrix), pack_linear(matrix, CheckpointFormat.V2)
    assert first["qweight"].tolist() == second["qweight"].tolist() == [[0xFF030201 - 2**32] * 4]
    assert first["qzeros"].tolist() == [[0xFE7F0100 - 2**32]]
    assert second["qzeros"].tolist() == [[0xFF800201 - 2**32]]


def test_words_written_by_hand_are_read_in_both_versions() -> None:
    """One input group of 8, 8 outputs; all codes 9, 9, ..., 9 but the first input's, which are 0xA."""
    tensors = {
        "qweight": torch.tensor([[0x9999999A - 2**32] * 8], dtype=torch.int32),
        "qzeros": torch.tensor([[0x76543210]], dtype=torch.int32),
        "scales": torch.full((1, 8), 2.0, dtype=torch.float16),
        "g_idx": torch.zeros(8, dtype=torch.int32),
    }
    first = unpack_linear("linear", tensors, V1).dequantize()
    second = unpack_linear("linear", tensors, V2).dequantize()
    assert first[:, 0].tolist() == [18.0, 16.0, 14.0, 12.0, 10.0, 8.0, 6.0, 4.0]
    assert second[:, 0].tolist() == [20.0, 18.0, 16.0, 14.0, 12.0, 10.0, 8.0, 6.0]
    assert first[0].tolist() == [18.0] + [16.0] * 7


def test_shuffled_words_written_by_hand_take_the_scale_that_g_idx_names() -> None:
    tensors = {
        "qweight": torch.tensor([[0x99999999 - 2**32] * 8], dtype=torch.int32),
        "qzeros": torch.full((2, 1), 0x77777777, dtype=torch.int32),
        "scales": torch.tensor([[1.0], [4.0]], dtype=torch.float16).repeat(1, 8),
        "g_idx": torch.tensor([0, 1, 1, 0, 1, 0, 0, 1], dtype=torch.int32),
    }
    weight = unpack_linear("linear", tensors, V1).dequantize()
    assert weight[3].tolist() == [1.0, 4.0, 4.0, 1.0, 4.0, 1.0, 1.0, 4.0]


def test_shapes_and_types_are_those_of_the_format() -> None:
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in pack_linear(random_matrix()).items()}
    assert shapes == {
        "qweight": ((8, 24), torch.int32),
        "qzeros": ((2, 3), torch.int32),
        "scales": ((2, 24), torch.float16),
        "g_idx": ((64,), torch.int32),
    }


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("settings", "zero_offset"), [(V1, 1), (V2, 0)])
def test_two_independent_readers_see_the_weight_that_was_written(
    bits: int, settings: GptqSettings, zero_offset: int
) -> None:
    matrix = random_matrix(bits)
    tensors = pack_linear(matrix, settings.checkpoint_format)
    assert torch.equal(unpack_linear("linear", tensors, replace(settings, bits=bits)).dequantize(), matrix.dequantize())
    assert torch.equal(independent_weight(tensors, zero_offset), matrix.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_all_positive_matrix_survives_the_format(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand((16, 64), generator=generator) + 0.5
    inputs = torch.randn((128, 64), generator=generator)
    options = GptqOptions(group_size=32, symmetric=symmetric)
    matrix = quantize_matrix(weight, inputs.t() @ inputs, options).matrix
    assert torch.equal(independent_weight(pack_linear(matrix)), matrix.dequantize())


def test_zero_point_zero_is_refused_instead_of_spoiling_its_word() -> None:
    matrix = random_matrix()
    zeros = matrix.zeros.clone()
    zeros[5, 1] = 0
    with pytest.raises(ValueError, match="cannot store zero point 0"):
        pack_linear(replace(matrix, zeros=zeros))
    tensors = pack_linear(replace(matrix, zeros=zeros), CheckpointFormat.V2)
    assert torch.equal(unpack_linear("linear", tensors, V2).zeros, zeros)


def test_version_2_stores_the_zero_point_itself() -> None:
    tensors = pack_linear(random_matrix())
    first = unpack_linear("linear", tensors, V1)
    second = unpack_linear("linear", tensors, V2)
    assert torch.equal(second.zeros + 1, first.zeros)


def test_ambiguous_zero_points_of_version_1_are_refused_by_name() -> None:
    tensors = pack_linear(random_matrix())
    tensors["qzeros"][0, 0] |= 0xF
    with pytest.raises(CheckpointError, match="q_proj: qzeros hold 15"):
        unpack_linear("q_proj", tensors, V1)
    assert int(unpack_linear("q_proj", tensors, V2).zeros.max()) == 15


def test_bits_are_those_of_the_linear_where_a_checkpoint_mixes_them() -> None:
    assert unpack_linear("linear", pack_linear(random_matrix(8)), V1).bits == 8


def test_a_file_without_g_idx_has_its_groups_in_order() -> None:
    matrix = random_matrix()
    tensors = pack_linear(matrix)
    del tensors["g_idx"]
    assert torch.equal(unpack_linear("linear", tensors, V1).dequantize(), matrix.dequantize())


@pytest.mark.parametrize("bits", [4, 8])
def test_reordered_inputs_keep_their_groups(bits: int) -> None:
    generator = torch.Generator().manual_seed(1)
    group_of_input = (torch.randperm(64, generator=generator) // 32).to(torch.int32)
    matrix = replace(random_matrix(bits), group_of_input=group_of_input)
    tensors = pack_linear(matrix)
    found = unpack_linear("linear", tensors, V1)
    assert found.group_of_input is not None
    assert torch.equal(found.group_of_input, group_of_input)
    assert found.group_size == 32
    assert torch.equal(found.dequantize(), matrix.dequantize())
    assert torch.equal(independent_weight(tensors), matrix.dequantize())


def test_a_short_last_group_is_read_as_other_quantisers_write_it() -> None:
    tensors = pack_linear(random_matrix())
    tensors["g_idx"] = torch.arange(64, dtype=torch.int32) // 48  # groups of 48 and of 16 inputs
    found = unpack_linear("linear", tensors, V1)
    assert found.group_size == 48
    assert torch.equal(found.dequantize(), independent_weight(tensors))


def test_groups_that_have_no_scale_are_refused_by_name() -> None:
    tensors = pack_linear(random_matrix())
    tensors["g_idx"][3] = 2
    with pytest.raises(CheckpointError, match=r"down_proj: g_idx names groups 0\.\.2; scales hold 0\.\.1"):
        unpack_linear("down_proj", tensors, V1)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_a_missing_tensor_is_named(part: str) -> None:
    tensors = pack_linear(random_matrix())
    del tensors[part]
    with pytest.raises(CheckpointError, match=f"tensor q_proj.{part} is missing"):
        unpack_linear("q_proj", tensors, V1)


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("scales", torch.ones((0, 24), dtype=torch.float16)),
        ("scales", torch.ones((3, 24), dtype=torch.float16)),
        ("scales", torch.ones((2, 16), dtype=torch.float16)),
        ("qzeros", torch.ones((2, 2), dtype=torch.int32)),
        ("g_idx", torch.zeros(60, dtype=torch.int32)),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_refused(part: str, tensor: Tensor) -> None:
    with pytest.raises(CheckpointError, match="q_proj"):
        unpack_linear("q_proj", {**pack_linear(random_matrix()), part: tensor}, V1)


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method 'awq' is not supported"),
        (
            {"bits": 4, "checkpoint_format": "gptq_v9"},
            "checkpoint_format 'gptq_v9' is not known; known are gptq, gptq_v2",
        ),
        ({"bits": 4, "is_marlin_format": True}, "checkpoint_format 'marlin'"),
        ({"bits": 3}, "3-bit weights are not supported; 4 and 8 are"),
        ({"bits": 4, "group_size": 0}, "group_size must be"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(section: dict[str, object], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        parse_settings(section, "config.json")


def test_settings_of_old_checkpoints_are_taken_from_quantize_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert gptq_settings(tmp_path) is None
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 128}), encoding="utf-8")
    assert gptq_settings(tmp_path) == GptqSettings(4, 128, CheckpointFormat.V1)


def test_linears_are_read_from_every_file_of_a_directory(tmp_path: Path) -> None:
    matrices = {f"model.layers.{index}.mlp.up_proj": random_matrix(seed=index) for index in range(3)}
    for index, (name, matrix) in enumerate(matrices.items()):
        tensors = {f"{name}.{part}": tensor for part, tensor in pack_linear(matrix).items()}
        save_file(
            {**tensors, f"model.layers.{index}.norm.weight": torch.ones(2)}, tmp_path / f"part-{index}.safetensors"
        )
    section = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}), encoding="utf-8")
    found = read_quantized_linears(tmp_path)
    assert found.keys() == matrices.keys()
    assert all(torch.equal(found[name].dequantize(), matrices[name].dequantize()) for name in matrices)


def test_packed_tensors_are_told_from_plain_ones() -> None:
    assert is_packed_tensor("model.layers.0.mlp.up_proj.qweight")
    assert not is_packed_tensor("model.layers.0.mlp.up_proj.bias")
    assert not is_packed_tensor("model.norm.weight")


def test_independent_reader_works_from_the_format_alone() -> None:
    """Words written by hand, with nothing that the writer made."""
    qweight = np.array([[0x0000000F, 0x10000000]], dtype=np.int32).repeat(4, axis=1)
    qzeros = np.array([[0]], dtype=np.int32)  # every zero point is 1
    scales = np.full((1, 8), 2.0, dtype=np.float16)
    weight = weight_from_words(qweight, qzeros, scales, np.zeros(8, dtype=np.int32))
    assert weight[0].tolist() == [28.0, -2.0, -2.0, -2.0, -2.0, -2.0, -2.0, -2.0]
    assert weight[7].tolist() == [-2.0] * 7 + [0.0]
