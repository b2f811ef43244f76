"""Exported files against the `gguf` package's own reader and dequantiser, and against our reader."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NoReturn

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as GgmlType
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from quant.commands_export import export
from quant.convert.export import Embeddings, export_gguf
from quant.errors import CheckpointError
from quant.formats.autogptq import pack_linear, read_quantized_linears
from quant.formats.gguf_conversion import can_keep_codes, convert_gguf
from quant.progress import SilentProgress
from serving.model.weights import load_decoder
from tests.quant.random_matrix import random_matrix
from tests.quant.tiny_gguf import byte_level_tokens, write_llama
from tests.quant.tiny_gguf import permute_rows as reference_permutation
from tests.quant.tiny_models import CONFIG, PALM, write_source

pytestmark = pytest.mark.unit

HEADS, KV_HEADS = 4, 2
QWEN3: dict[str, object] = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16}
QWEN2: dict[str, object] = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
LLAMA3_SCALING: dict[str, object] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def tokenizer_definition(vocab_size: int = 128) -> dict[str, object]:
    """A smollm tokenizer of fewer tokens than the tiny model has embeddings, as padded vocabularies are."""
    tokens = byte_level_tokens()[:3] + list("abcdefghijklmnopqrstuvwxyz0123456789ĠĊ,.")
    tokens += ["he", "ll", "hell"]
    assert len(tokens) < vocab_size
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": index, "content": tokens[index], "special": index != 0, "lstrip": False, "rstrip": False,
             "single_word": False, "normalized": False}
            for index in range(3)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [["h", "e"], ["l", "l"], ["he", "ll"]],
        },
    }  # fmt: skip


def write_plain(directory: Path, changes: Mapping[str, object] | None = None) -> Path:
    write_source(directory, torch.float16, **(changes or {}))
    write_json(directory / "tokenizer.json", tokenizer_definition())
    write_json(directory / "tokenizer_config.json", {"eos_token": {"content": "<|im_end|>"}, "unk_token": None})
    write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [0, 2]})
    return directory


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_gptq(directory: Path, *, symmetric: bool = True) -> Path:
    """The tiny model with every linear's weight replaced by random codes; q_proj and down_proj in 8 bits."""
    target = write_plain(directory / "gptq")
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(target / "model.safetensors").items():
        linear = name.removesuffix(".weight")
        if not linear.endswith("_proj"):
            tensors[name] = weight
            continue
        bits = 8 if symmetric and linear.endswith(("q_proj", "down_proj")) else 4
        matrix = random_matrix(bits, 32, symmetric=symmetric, rows=weight.shape[0], columns=weight.shape[1])
        tensors |= {f"{linear}.{part}": tensor for part, tensor in pack_linear(matrix).items()}
    save_file(tensors, target / "model.safetensors")
    section = {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 32, "sym": symmetric}
    write_json(target / "config.json", {**CONFIG, "quantization_config": section})
    return target


def read_back(path: Path) -> dict[str, np.ndarray]:
    """Every tensor by GGUF's name, dequantised by the package, in row-major order."""
    reader = gguf.GGUFReader(path)
    return {str(tensor.name): gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


@pytest.mark.parametrize("symmetric", [True, False])
def test_exported_gptq_model_is_read_back_as_its_codes_say(tmp_path: Path, symmetric: bool) -> None:
    directory = write_gptq(tmp_path, symmetric=symmetric)
    report = export_gguf(directory, tmp_path / "m.gguf", SilentProgress())
    tensors = read_back(tmp_path / "m.gguf")
    for name, matrix in read_quantized_linears(directory).items():
        layer, part = name.split(".")[2], name.split(".")[-1]
        names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
        names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
        expected = matrix.dequantize().numpy()
        if part in ("q_proj", "k_proj"):
            expected = reference_permutation(expected, HEADS if part == "q_proj" else KV_HEADS)
        found = tensors[f"blk.{layer}.{names[part]}.weight"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=0 if symmetric else 3e-4, err_msg=name)
    expected_types = {"F16": 1, "Q4_0": 10, "Q8_0": 4} if symmetric else {"F16": 1, "Q4_1": 14}
    assert report.num_of_type == expected_types
    assert report.file_bytes == (tmp_path / "m.gguf").stat().st_size
    assert len(report.notes) == (0 if symmetric else 1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": LLAMA3_SCALING, "rope_theta": 500_000.0},
        {"tie_word_embeddings": False, "attention_bias": True},
        QWEN2,
        QWEN3,
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
        PALM,
    ],
)
def test_model_exported_and_converted_back_gives_the_same_logits(tmp_path: Path, changes: dict[str, object]) -> None:
    source = write_plain(tmp_path / "source", changes)
    export_gguf(source, tmp_path / "m.gguf", SilentProgress(), chat_template="{{ messages }}")
    back = tmp_path / "back"
    back.mkdir()
    convert_gguf(tmp_path / "m.gguf", back)
    ids = torch.arange(40).view(1, -1) % 128
    with torch.inference_mode():
        logits = [load_decoder(directory, dtype=torch.float32)(ids) for directory in (source, back)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-6)
    text = "hello 42,\n<|im_end|>"
    tokens = [Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids for directory in (source, back)]
    assert tokens[0] == tokens[1]
    assert (back / "chat_template.jinja").read_text() == "{{ messages }}"
    # The tokenizer's own end token comes first.
    assert json.loads((back / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


@pytest.mark.parametrize(("bits", "kind"), [(4, "Q4_0"), (8, "Q8_0")])
@pytest.mark.parametrize("is_tied", [True, False])
def test_quantised_head_and_embeddings_are_moved_bit_for_bit(
    tmp_path: Path, is_tied: bool, bits: int, kind: str
) -> None:
    changes: dict[str, object] = {"tie_word_embeddings": is_tied, "num_hidden_layers": 1}
    directory = write_plain(tmp_path / "gptq", changes)
    tensors = load_file(directory / "model.safetensors")
    ends = {"model.embed_tokens": "token_embd.weight"} | ({} if is_tied else {"lm_head": "output.weight"})
    matrices = {name: random_matrix(bits, 32, symmetric=True, rows=128, columns=64) for name in ends}
    for name, matrix in matrices.items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": tensor for part, tensor in pack_linear(matrix).items()}
    save_file(tensors, directory / "model.safetensors")
    section = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": True, "lm_head": not is_tied}
    write_json(directory / "config.json", {**CONFIG, **changes, "quantization_config": section})

    report = export_gguf(directory, tmp_path / "out.gguf", SilentProgress())

    assert report.num_of_type[kind] == len(ends)
    written = read_back(tmp_path / "out.gguf")
    assert ("output.weight" in written) == (not is_tied)
    for name, theirs in ends.items():
        assert np.array_equal(written[theirs], matrices[name].dequantize().numpy())


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_that_were_exported_come_back_bit_for_bit(tmp_path: Path, symmetric: bool) -> None:
    directory = write_gptq(tmp_path, symmetric=symmetric)
    export_gguf(directory, tmp_path / "m.gguf", SilentProgress())
    back = tmp_path / "back"
    back.mkdir()
    assert can_keep_codes(tmp_path / "m.gguf")
    convert_gguf(tmp_path / "m.gguf", back, keep_codes=True)
    before, after = read_quantized_linears(directory), read_quantized_linears(back)
    assert before.keys() == after.keys()
    for name, matrix in before.items():
        for part in ("codes", "scales", "zeros"):
            assert torch.equal(getattr(matrix, part), getattr(after[name], part)), (name, part)
    ids = torch.arange(40).view(1, -1) % 128
    with torch.inference_mode():
        assert torch.equal(load_decoder(directory)(ids), load_decoder(back)(ids))
    assert json.loads((back / "config.json").read_text())["quantization_config"]["sym"] is symmetric


@pytest.mark.parametrize("kind", [GgmlType.F16, GgmlType.Q4_1])
def test_codes_that_gptq_cannot_hold_are_not_kept(tmp_path: Path, kind: GgmlType) -> None:
    """Q4_1 as llama.cpp's own quantiser makes it has minimums between the steps."""
    assert not can_keep_codes(write_llama(tmp_path / "m.gguf", kind))


@pytest.mark.parametrize("kind", [GgmlType.Q4_0, GgmlType.Q8_0])
def test_codes_with_scales_that_are_not_finite_are_not_kept(tmp_path: Path, kind: GgmlType) -> None:
    path = write_llama(tmp_path / "m.gguf", kind)
    assert can_keep_codes(path)
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.0.ffn_up.weight")
    content = bytearray(path.read_bytes())
    content[tensor.data_offset : tensor.data_offset + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(content)
    assert not can_keep_codes(path)


def test_bfloat16_is_kept_where_float16_would_lose(tmp_path: Path) -> None:
    source = write_plain(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = (weights[name].float() * 1e-6).to(torch.bfloat16)
    save_file(weights, source / "model.safetensors")
    report = export_gguf(source, tmp_path / "m.gguf", SilentProgress())
    assert report.num_of_type["BF16"] == 1
    np.testing.assert_array_equal(read_back(tmp_path / "m.gguf")["blk.0.ffn_up.weight"], weights[name].float().numpy())


def test_eight_bits_become_float16_only_on_request(tmp_path: Path) -> None:
    directory = write_gptq(tmp_path)
    assert export([str(directory), str(tmp_path / "m.gguf"), "--eight-bit-as", "f16"]) == 0
    expected = read_quantized_linears(directory)["model.layers.1.mlp.down_proj"].dequantize()
    found = read_back(tmp_path / "m.gguf")["blk.1.ffn_down.weight"]
    np.testing.assert_array_equal(found, expected.to(torch.float16).float().numpy())


def test_embeddings_are_rounded_only_on_request(tmp_path: Path) -> None:
    source = write_plain(tmp_path / "source")
    export_gguf(source, tmp_path / "m.gguf", SilentProgress(), embeddings=Embeddings.Q8_0)
    types = {str(tensor.name): tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["token_embd.weight"] == "Q8_0"
    assert types["output_norm.weight"] == "F32"


def test_package_reads_the_metadata_that_llama_cpp_needs(tmp_path: Path) -> None:
    export_gguf(write_plain(tmp_path / "source"), tmp_path / "m.gguf", SilentProgress())
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    wanted = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.dimension_count": 16,
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: fields[key].contents() for key in wanted} == wanted
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == "[PAD127]"
    assert fields["tokenizer.ggml.token_type"].contents()[:4] == [4, 3, 3, 1]
    assert fields["tokenizer.ggml.merges"].contents() == ["h e", "l l", "he ll"]


@pytest.mark.parametrize(("slides", "length"), [(True, 256), (False, 1024)])
def test_context_ends_where_attention_would_slide(tmp_path: Path, slides: bool, length: int) -> None:
    source = write_plain(tmp_path / "source", {**QWEN2, "sliding_window": 256, "use_sliding_window": slides})
    export_gguf(source, tmp_path / "m.gguf", SilentProgress())
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["qwen2.context_length"].contents() == length


def changed_tokenizer(**changes: object) -> dict[str, object]:
    return {**tokenizer_definition(), **changes}


BERT_FRAME = {"type": "BertProcessing", "sep": ["a", 3], "cls": ["b", 4]}
REFUSED_TOKENIZERS: list[tuple[dict[str, object], str]] = [
    (changed_tokenizer(pre_tokenizer={"type": "Whitespace"}), "convert_hf_to_gguf.py"),
    (changed_tokenizer(normalizer={"type": "Lowercase"}), "has no name here"),
    (changed_tokenizer(model={"type": "Unigram", "vocab": []}), "'Unigram'"),
    (changed_tokenizer(model={**tokenizer_definition()["model"], "byte_fallback": True}), "sentencepiece"),  # type: ignore[dict-item]
    (changed_tokenizer(post_processor=BERT_FRAME), "frames texts"),
    (changed_tokenizer(added_tokens=[{"id": 128, "content": "late", "special": True}]), "embeddings 128 rows"),
    ({}, "no tokenizer.json"),
]


@pytest.mark.parametrize(("definition", "reason"), REFUSED_TOKENIZERS)
def test_tokenizer_that_gguf_cannot_describe_is_refused(
    tmp_path: Path, definition: dict[str, object], reason: str
) -> None:
    source = write_plain(tmp_path / "source")
    write_json(source / "tokenizer.json", definition)
    with pytest.raises(CheckpointError, match=reason):
        export_gguf(source, tmp_path / "m.gguf", SilentProgress())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_beginning_token_of_the_post_processor_is_written(tmp_path: Path) -> None:
    source = write_plain(tmp_path / "source")
    single = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single}
    frame = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    write_json(source / "tokenizer.json", changed_tokenizer(post_processor=frame))
    export_gguf(source, tmp_path / "m.gguf", SilentProgress())
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.add_bos_token"].contents() is True


def test_model_without_a_place_in_gguf_is_refused(tmp_path: Path) -> None:
    source = write_plain(tmp_path / "source")
    write_json(source / "config.json", {**CONFIG, "architectures": ["BloomForCausalLM"]})
    with pytest.raises(CheckpointError, match=r"is a BloomForCausalLM; GGUF is written for LlamaForCausalLM"):
        export_gguf(source, tmp_path / "m.gguf", SilentProgress())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"attention_bias": True}, "has no biases"), ({"tie_word_embeddings": False}, "head of its own")],
)
def test_what_llama_cpp_lacks_in_a_parallel_model_is_refused(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    source = write_plain(tmp_path / "source", {**PALM, **changes})
    with pytest.raises(CheckpointError, match=reason):
        export_gguf(source, tmp_path / "m.gguf", SilentProgress())


def test_missing_tensor_is_named_before_anything_is_written(tmp_path: Path) -> None:
    source = write_plain(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, for 'blk.1.ffn_up.weight'"):
        export_gguf(source, tmp_path / "m.gguf", SilentProgress())


def test_existing_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        export_gguf(write_plain(tmp_path / "source"), tmp_path / "m.gguf", SilentProgress())
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: BinaryIO) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = write_plain(tmp_path / "source")
    monkeypatch.setattr("quant.formats.gguf_writer.os.fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device after 0 MB; nothing was left there"):
        export_gguf(source, tmp_path / "m.gguf", SilentProgress())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_command_writes_the_file_and_says_what_is_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_gptq(tmp_path)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    assert export([str(directory), str(tmp_path / "m.gguf")]) == 0
    assert "matrices: 1 F16, 10 Q4_0, 4 Q8_0" in capsys.readouterr().out
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
