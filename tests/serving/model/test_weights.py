from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quant.errors import CheckpointError
from quant.formats.autogptq import pack_linear
from quant.formats.checkpoint_names import checkpoint_names
from quant.int4_linear import QuantizedLinear
from quant.method.matrix import QuantizedMatrix
from serving.model.transformer import Decoder
from serving.model.weights import decoder_from_tensors, load_decoder, locate_tensors, read_config, save_decoder
from tests.serving.model.checkpoints import build_model, edit_config, random_ids, save_model

pytestmark = pytest.mark.unit

WEIGHTS = "model.safetensors"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_model(build_model("llama"), tmp_path)
    return tmp_path


def edit_weights(directory: Path, add: dict[str, torch.Tensor] | None = None, remove: tuple[str, ...] = ()) -> None:
    tensors = load_file(directory / WEIGHTS)
    kept = {name: tensor.clone() for name, tensor in tensors.items() if name not in remove}
    save_file({**kept, **(add or {})}, directory / WEIGHTS)


def test_shards_load_to_the_same_weights_as_one_file(tmp_path: Path) -> None:
    model = build_model("qwen2")
    save_model(model, tmp_path / "one")
    save_model(model, tmp_path / "many", max_shard_size="40KB")
    assert len(set(locate_tensors(tmp_path / "many").values())) > 2

    one, many = load_decoder(tmp_path / "one"), load_decoder(tmp_path / "many")

    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, many.get_parameter(name)), name


def test_stored_type_is_converted_to_the_one_asked_for(llama: Path) -> None:
    half = load_decoder(llama, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert not any(parameter.is_meta for parameter in half.parameters())


def test_loaded_parameters_can_be_trained_without_touching_the_file(llama: Path) -> None:
    before = (llama / WEIGHTS).read_bytes()
    decoder = load_decoder(llama)
    with torch.no_grad():
        for parameter in decoder.parameters():
            assert parameter.requires_grad
            parameter.add_(1.0)
    assert (llama / WEIGHTS).read_bytes() == before


def test_loading_draws_no_normal_numbers(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device that would import torch's compiler: seconds of every start, and 80 MB."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("normal_ was called")

    monkeypatch.setattr(torch.nn.init, "normal_", refuse)
    load_decoder(llama)


def test_missing_and_unexpected_tensors_are_named(llama: Path) -> None:
    gone = "model.layers.1.mlp.up_proj.weight"
    edit_weights(llama, remove=(gone,))
    with pytest.raises(CheckpointError, match=f"lacks tensors: {gone}"):
        load_decoder(llama)

    edit_weights(llama, add={gone: torch.zeros(80, 48), "model.layers.0.self_attn.q_norm.weight": torch.zeros(8)})
    with pytest.raises(CheckpointError, match=r"that the model lacks: model\.layers\.0\.self_attn\.q_norm\.weight"):
        load_decoder(llama)


def test_wrong_shape_and_type_are_named(llama: Path) -> None:
    name = "model.norm.weight"
    edit_weights(llama, add={name: torch.zeros(47)}, remove=(name,))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \(47,\); config\.json makes it \(48,\)"):
        load_decoder(llama)
    edit_weights(llama, add={name: torch.zeros(48, dtype=torch.int8)}, remove=(name,))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is torch\.int8"):
        load_decoder(llama)


def test_derived_and_duplicate_tensors_are_ignored(tmp_path: Path) -> None:
    save_model(build_model("qwen2"), tmp_path)
    head = load_file(tmp_path / WEIGHTS)["model.embed_tokens.weight"].clone()
    edit_weights(tmp_path, add={"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4), "lm_head.weight": head})
    assert load_decoder(tmp_path).lm_head is None


def test_directories_that_cannot_be_read_say_why(llama: Path) -> None:
    (llama / WEIGHTS).write_bytes(b"\xff" * 20)
    with pytest.raises(CheckpointError, match="not a safetensors file that can be read"):
        load_decoder(llama)
    (llama / WEIGHTS).unlink()
    (llama / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is pickled, which is never read"):
        load_decoder(llama)
    (llama / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        load_decoder(llama)
    (llama / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        load_decoder(llama)


@pytest.mark.parametrize("shard", ["../other/model.safetensors", "absent.safetensors"])
def test_an_index_may_name_only_files_of_its_directory(llama: Path, shard: str) -> None:
    index = {"weight_map": {"model.norm.weight": shard}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"not the name of a file|does not exist"):
        load_decoder(llama)


def test_pickled_gptq_files_are_refused_by_name_with_what_to_do(llama: Path) -> None:
    (llama / WEIGHTS).rename(llama / "gptq_model-4bit-128g.bin")
    (llama / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    with pytest.raises(CheckpointError, match=r"gptq_model-4bit-128g\.bin is a pickled GPTQ file.*`causerie quantize`"):
        load_decoder(llama)


def test_a_quantised_file_under_autogptqs_name_is_found(llama: Path) -> None:
    twin = quantize_on_disk(llama)
    (llama / WEIGHTS).rename(llama / "gptq_model-4bit-16g.safetensors")
    with torch.no_grad():
        assert torch.equal(load_decoder(llama)(random_ids()), twin(random_ids()))
    shutil.copyfile(llama / "gptq_model-4bit-16g.safetensors", llama / "gptq_model-4bit-32g.safetensors")
    with pytest.raises(CheckpointError, match="several quantised models"):
        load_decoder(llama)


def test_a_shard_that_lacks_what_the_index_gives_it_is_refused(llama: Path) -> None:
    index = {"weight_map": {"model.absent.weight": WEIGHTS}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks model\.absent\.weight, which"):
        load_decoder(llama)


@pytest.mark.parametrize("name", ["bloom", "gpt_neox"])
def test_a_saved_decoder_of_another_family_loads_in_transformers(name: str, tmp_path: Path) -> None:
    model = build_model(name)
    save_model(model, tmp_path)
    save_decoder(load_decoder(tmp_path), tmp_path / "saved", read_config(tmp_path))
    before, after = load_file(tmp_path / WEIGHTS), load_file(tmp_path / "saved" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_names_without_the_prefix_are_read(tmp_path: Path) -> None:
    """BLOOM's own files, which hold the model without its head, name nothing `transformer.`."""
    model = build_model("bloom")
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}, tmp_path / WEIGHTS)
    with torch.no_grad():
        torch.testing.assert_close(load_decoder(tmp_path)(random_ids()), model(random_ids()).logits, atol=1e-4, rtol=0)


def test_buffers_of_old_gpt_neox_files_and_the_newer_name_of_its_head_are_read(tmp_path: Path) -> None:
    save_model(build_model("gpt_neox"), tmp_path)
    expected = load_decoder(tmp_path).state_dict()
    layer = "gpt_neox.layers.0.attention."
    buffers = {
        layer + "bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        layer + "masked_bias": torch.tensor(-1e9),
        layer + "rotary_emb.inv_freq": torch.zeros(2),
    }
    head = load_file(tmp_path / WEIGHTS)["embed_out.weight"]
    edit_weights(tmp_path, add={**buffers, "lm_head.weight": head}, remove=("embed_out.weight",))
    found = load_decoder(tmp_path).state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_missing_fused_tensors_are_named_once_as_on_disk(tmp_path: Path) -> None:
    save_model(build_model("gpt_neox"), tmp_path)
    gone = "gpt_neox.layers.1.attention.query_key_value.weight"
    edit_weights(tmp_path, remove=(gone,))
    with pytest.raises(CheckpointError, match=f"lacks tensors: {gone}$"):
        load_decoder(tmp_path)


def test_saved_decoder_reads_back_equal_also_over_its_own_source(llama: Path) -> None:
    decoder = load_decoder(llama)
    with torch.no_grad():
        decoder.get_parameter("model.norm.weight").mul_(1.5)
        expected = decoder(random_ids())

    save_decoder(decoder, llama, read_config(llama))

    with torch.no_grad():
        assert torch.equal(load_decoder(llama)(random_ids()), expected)
        assert torch.equal(decoder(random_ids()), expected)


def random_matrix(linear: nn.Linear, seed: int) -> QuantizedMatrix:
    generator = torch.Generator().manual_seed(seed)
    groups = (linear.out_features, linear.in_features // 16)
    return QuantizedMatrix(
        codes=torch.randint(0, 16, (linear.out_features, linear.in_features), dtype=torch.uint8, generator=generator),
        scales=(torch.rand(groups, generator=generator) * 0.05 + 0.01).to(torch.float16).to(torch.float32),
        zeros=torch.full(groups, 8, dtype=torch.uint8),
        bits=4,
        group_size=16,
    )


def quantize_on_disk(directory: Path) -> Decoder:
    """Replace every projection of the layers in the file by a random packed one; return the dequantised twin."""
    twin = load_decoder(directory)
    added: dict[str, torch.Tensor] = {}
    removed: list[str] = []
    for seed, (name, module) in enumerate(twin.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith("model.layers."):
            matrix = random_matrix(module, seed)
            added.update({f"{name}.{part}": tensor for part, tensor in pack_linear(matrix).items()})
            removed.append(f"{name}.weight")
            module.weight = nn.Parameter(matrix.dequantize())
    edit_weights(directory, add=added, remove=tuple(removed))
    edit_config(directory, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True})
    return twin


def test_gptq_checkpoint_loads_as_quantised_linears_with_biases(tmp_path: Path) -> None:
    save_model(build_model("qwen2"), tmp_path)
    twin = quantize_on_disk(tmp_path)

    decoder = load_decoder(tmp_path)

    quantized = [name for name, module in decoder.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(quantized) == 3 * 7
    with torch.no_grad():
        assert torch.equal(decoder(random_ids()), twin(random_ids()))


def test_zero_biases_of_gptq_writers_are_ignored_and_others_refused(llama: Path) -> None:
    quantize_on_disk(llama)
    name = "model.layers.0.mlp.down_proj.bias"
    edit_weights(llama, add={name: torch.zeros(48)})
    load_decoder(llama)
    edit_weights(llama, add={name: torch.ones(48)}, remove=(name,))
    with pytest.raises(CheckpointError, match=name):
        load_decoder(llama)


def test_packed_tensors_without_settings_are_unexpected(llama: Path) -> None:
    quantize_on_disk(llama)
    edit_config(llama, quantization_config=...)
    with pytest.raises(CheckpointError, match=r"that the model lacks: model\.layers\.0\.mlp\.down_proj\.g_idx"):
        load_decoder(llama)


def test_packed_linear_of_another_shape_is_refused(llama: Path) -> None:
    quantize_on_disk(llama)
    edit_config(llama, intermediate_size=96)
    with pytest.raises(CheckpointError, match=r"down_proj is \(48, 80\); config\.json makes it \(48, 96\)"):
        load_decoder(llama)


def test_quantised_decoder_is_not_written_as_plain_weights(llama: Path) -> None:
    quantize_on_disk(llama)
    with pytest.raises(CheckpointError, match="cannot be written as plain weights"):
        save_decoder(load_decoder(llama), llama / "out", read_config(llama))


@pytest.mark.parametrize("name", ["llama", "qwen2", "palm", "bloom", "gpt_neox"])
def test_weights_in_memory_make_the_decoder_that_their_files_make(name: str, tmp_path: Path) -> None:
    model = build_model(name)
    save_model(model, tmp_path)
    decoder = decoder_from_tensors(read_config(tmp_path), model.state_dict(), torch.float32)
    with torch.no_grad():
        assert torch.equal(decoder(random_ids()), load_decoder(tmp_path)(random_ids()))
    norm = checkpoint_names(read_config(tmp_path)).stored("model.norm.weight").name
    assert decoder.model.norm.weight.data_ptr() == model.get_parameter(norm).data_ptr()


def test_weights_in_memory_that_do_not_fit_are_named(llama: Path) -> None:
    config, tensors = read_config(llama), load_file(llama / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=f"these weights lack tensors: {name}"):
        decoder_from_tensors(config, {key: tensors[key] for key in tensors if key != name}, torch.float32)
    with pytest.raises(CheckpointError, match=r"have names that the model lacks: base\.weight"):
        decoder_from_tensors(config, {**tensors, "base.weight": torch.zeros(1)}, torch.float32)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is \(2,\); the configuration makes it \(80, 48\)"):
        decoder_from_tensors(config, {**tensors, name: torch.zeros(2)}, torch.float32)
