"""The GGUF reader against the `gguf` package's own writer and dequantiser, and the conversion to a model directory."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as GgmlType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer

from quant.errors import CheckpointError
from quant.formats.gguf import MAX_HEADER_BYTES, TENSOR_TYPES, GgufFile
from quant.formats.gguf_conversion import convert_gguf, unpermute_rows
from tests.quant.tiny_gguf import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    byte_level_tokens,
    llama_weights,
    permute_rows,
    write_file,
    write_llama,
)

pytestmark = pytest.mark.unit

# Far below what the lengths in a hostile header ask for; the small files below need some kilobytes.
MEMORY_LIMIT = 8 * 2**20


def random_blocks(kind: GgmlType, rows: int, columns: int) -> np.ndarray:
    """Random bytes as blocks of `kind`, with every fp16 scale set to an ordinary number."""
    block, num_bytes = gguf.constants.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(int(kind))
    raw = rng.integers(0, 256, (rows * columns // block, num_bytes), dtype=np.uint8)
    scales = rng.normal(0, 0.01, (len(raw), 2)).astype(np.float16).view(np.uint8)
    starts = {GgmlType.Q4_0: (0, 2), GgmlType.Q8_0: (0, 2), GgmlType.Q4_1: (0, 4)}
    starts |= {GgmlType.Q5_0: (0, 2), GgmlType.Q5_1: (0, 4)}
    starts |= {GgmlType.Q4_K: (0, 4), GgmlType.Q6_K: (208, 210)}
    first, last = starts[kind]
    raw[:, first:last] = scales[:, : last - first]
    return raw.reshape(rows, -1)


@pytest.mark.parametrize(
    "kind",
    [GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1, GgmlType.Q8_0, GgmlType.Q4_K, GgmlType.Q6_K],
)
def test_every_quantised_type_dequantises_as_the_gguf_package_does(tmp_path: Path, kind: GgmlType) -> None:
    raw = random_blocks(kind, rows=6, columns=512)
    path = write_file(tmp_path / "m.gguf", lambda writer: writer.add_tensor("t", raw, raw_dtype=kind))
    with GgufFile(path) as file:
        values = file.read("t")
    assert values.shape == (6, 512)
    np.testing.assert_array_equal(values, gguf.dequantize(raw, kind))


@pytest.mark.parametrize("kind", [GgmlType.F32, GgmlType.F16, GgmlType.BF16])
def test_plain_types_are_read_exactly(tmp_path: Path, kind: GgmlType) -> None:
    exact = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    stored = gguf.quantize(exact, kind)
    path = write_file(tmp_path / "m.gguf", lambda writer: writer.add_tensor("t", stored, raw_dtype=kind))
    with GgufFile(path) as file:
        np.testing.assert_array_equal(file.read("t"), gguf.dequantize(stored, kind))


def test_supported_types_have_the_sizes_that_the_format_gives_them() -> None:
    for type_id, kind in TENSOR_TYPES.items():
        assert gguf.constants.GGML_QUANT_SIZES[GgmlType(type_id)] == (kind.block_elements, kind.block_bytes)
        assert GgmlType(type_id).name == kind.name


def test_metadata_of_every_kind_is_read_back(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_uint8("a", 200)
        writer.add_int64("b", -5)
        writer.add_float64("c", 0.1)
        writer.add_bool("d", True)
        writer.add_string("e", "naïve 你好")
        writer.add_array("f", ["x", "", "y"])
        writer.add_array("g", [1, -2, 3])
        writer.add_array("h", [True, False])

    with GgufFile(write_file(tmp_path / "m.gguf", fill)) as file:
        assert [file.metadata[key] for key in "abcdefgh"] == [
            200, -5, 0.1, True, "naïve 你好", ["x", "", "y"], [1, -2, 3], [True, False],
        ]  # fmt: skip


def small_file(tmp_path: Path) -> bytearray:
    values = np.ones((2, 32), np.float32)
    path = write_file(tmp_path / "small.gguf", lambda writer: writer.add_tensor("tensor", values))
    return bytearray(path.read_bytes())


def replaced(data: bytearray, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    return bytes(data.replace(old, new))


def as_is(data: bytearray) -> bytes:
    return bytes(data)


TENSOR_RECORD = b"tensor" + struct.pack("<IQQ", 2, 32, 2) + struct.pack("<IQ", 0, 0)


DAMAGES: list[tuple[Callable[[bytearray], bytes], str]] = [
    (lambda data: b"", "is empty"),
    (lambda data: b"GGML" + as_is(data)[4:], "starts with b'GGML'"),
    (lambda data: as_is(data)[:4] + struct.pack(">I", 3) + as_is(data)[8:], "little-endian"),
    (lambda data: as_is(data)[:30], "ends at byte 30"),
    (lambda data: as_is(data)[:-1], "'tensor' ends at byte"),
    (lambda data: as_is(data)[:8] + struct.pack("<Q", 2**60) + as_is(data)[16:], "has 0 dimensions"),
    (lambda data: as_is(data)[:16] + struct.pack("<Q", 2**60) + as_is(data)[24:], "ends at byte"),
    (
        lambda data: replaced(data, TENSOR_RECORD, b"tensor" + struct.pack("<IQQIQ", 2, 32, 2, 99, 0)),
        "type number 99, which is not supported; supported are F32",
    ),
    (
        lambda data: replaced(data, TENSOR_RECORD, b"tensor" + struct.pack("<IQQIQ", 9, 32, 2, 0, 0)),
        "9 dimensions",
    ),
    (
        lambda data: replaced(data, TENSOR_RECORD, b"tensor" + struct.pack("<IQQIQ", 2, 8, 8, 3, 0)),
        "Q4_1 rows hold 32",
    ),
    (
        lambda data: replaced(data, TENSOR_RECORD, b"tensor" + struct.pack("<IQQIQ", 2, 32, 2, 0, 7)),
        "not a multiple of 32",
    ),
    (
        lambda data: replaced(data, TENSOR_RECORD, b"tensor" + struct.pack("<IQQIQ", 2, 32, 2**58, 0, 0)),
        "the file at byte",
    ),
    (lambda data: replaced(data, b"tensor", b"ten\xff\xffr"), "not UTF-8"),
    (lambda data: with_metadata(data, struct.pack("<IIQ", 9, 0, 2**40)), "all arrays together may have"),
    (lambda data: with_metadata(data, struct.pack("<IIQ", 9, 8, 2**40)), "all arrays together may have"),
    (lambda data: with_metadata(data, struct.pack("<IQ", 8, 2**63)), "ends at byte"),
    (lambda data: with_metadata(data, struct.pack("<I", 99)), "unknown value type 99"),
    (lambda data: with_metadata(data, struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 6), "nests arrays"),
    (lambda data: with_metadata(data, struct.pack("<II", 4, 2**31), key=b"general.alignment"), "expected 1 to"),
    (lambda data: with_metadata(data, struct.pack("<II", 4, 0), key=b"general.alignment"), "expected 1 to"),
]


def with_metadata(data: bytearray, typed_value: bytes, *, key: bytes = b"extra") -> bytes:
    """The file with one more entry in front; what follows moves, and is not reached where the entry is refused."""
    head = bytes(data[:16]) + struct.pack("<Q", int.from_bytes(data[16:24], "little") + 1)
    return head + struct.pack("<Q", len(key)) + key + typed_value + bytes(data[24:])


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("first", np.ones((2, 32), np.float32))
        writer.add_tensor("second", np.ones((2, 32), np.float32))

    path = write_file(tmp_path / "m.gguf", fill)
    second = b"second" + struct.pack("<IQQI", 2, 32, 2, 0)
    moved = replaced(bytearray(path.read_bytes()), second + struct.pack("<Q", 256), second + struct.pack("<Q", 224))
    path.write_bytes(moved)
    with pytest.raises(CheckpointError, match="'second' overlaps"):
        GgufFile(path)


def test_header_above_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", MAX_HEADER_BYTES)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(2 * MAX_HEADER_BYTES)  # sparse: takes no disk
    with pytest.raises(CheckpointError, match="headers are read up to"):
        read_in_little_memory(path)


def read_in_little_memory(path: Path) -> None:
    tracemalloc.start()
    try:
        with GgufFile(path) as file:
            for name in file.tensors:
                file.read(name)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < MEMORY_LIMIT


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 2400), st.binary(min_size=1, max_size=9)), min_size=1, max_size=3),
    cut=st.integers(0, 400),
)
def test_mutated_file_is_read_or_refused_in_little_memory(
    tmp_path: Path, edits: list[tuple[int, bytes]], cut: int
) -> None:
    raw = bytearray(mutable_file(tmp_path))
    for position, change in edits:
        raw[position % len(raw) : position % len(raw) + len(change)] = change
    path = tmp_path / "mutated.gguf"
    path.write_bytes(raw[: len(raw) - cut])
    with contextlib.suppress(CheckpointError):
        read_in_little_memory(path)


LARGE_NUMBERS = [struct.pack("<Q", value) for value in (0, 1, 2**16, 2**31, 2**32, 2**40, 2**63, 2**64 - 1)]


@pytest.mark.parametrize("number", LARGE_NUMBERS)
def test_any_count_or_length_may_be_replaced_by_any_other(tmp_path: Path, number: bytes) -> None:
    original = mutable_file(tmp_path)
    path = tmp_path / "mutated.gguf"
    for position in range(8, 700, 12):
        path.write_bytes(original[:position] + number + original[position + 8 :])
        with contextlib.suppress(CheckpointError):
            read_in_little_memory(path)


def mutable_file(tmp_path: Path) -> bytes:
    """A file with every kind of metadata and two tensors; written once."""
    path = tmp_path / "original.gguf"
    if not path.exists():

        def fill(writer: gguf.GGUFWriter) -> None:
            writer.add_array("tokens", ["a", "bc", ""])
            writer.add_array("types", [1, 3, 5])
            writer.add_bool("flag", True)
            writer.add_float32("number", 1.5)
            writer.add_string("template", "{{ messages }}")
            writer.add_tensor("first", np.ones((2, 32), np.float32))
            writer.add_tensor(
                "second", gguf.quantize(np.ones((4, 32), np.float32), GgmlType.Q4_0), raw_dtype=GgmlType.Q4_0
            )

        write_file(path, fill)
    return path.read_bytes()


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_malformed_file_is_refused_with_what_was_wrong(
    tmp_path: Path, damage: Callable[[bytearray], bytes], reason: str
) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(damage(small_file(tmp_path)))
    with pytest.raises(CheckpointError, match=reason):
        GgufFile(path)


@pytest.mark.parametrize("cut", range(0, 150, 7))
def test_truncated_header_never_raises_anything_but_a_checkpoint_error(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(bytes(small_file(tmp_path))[:cut])
    with pytest.raises(CheckpointError):
        GgufFile(path)


def converted(tmp_path: Path, kind: GgmlType) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    convert_gguf(write_llama(tmp_path / "model.gguf", kind), directory)
    return directory


def test_unpermuting_undoes_the_converters_permutation() -> None:
    values = np.arange(HEADS * HEAD_DIM * 3, dtype=np.float32).reshape(-1, 3)
    restored = unpermute_rows(torch.from_numpy(permute_rows(values, HEADS).copy()), HEADS)
    np.testing.assert_array_equal(restored.numpy(), values)


def test_conversion_restores_names_rows_and_values_exactly(tmp_path: Path) -> None:
    weights = load_file(converted(tmp_path, GgmlType.F32) / "model.safetensors")
    expected = llama_weights()
    assert weights.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(weights[name].numpy(), values, err_msg=name)


def test_quantised_matrices_become_float16_and_norms_stay_exact(tmp_path: Path) -> None:
    directory = converted(tmp_path, GgmlType.Q4_1)
    weights = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    reference = gguf.dequantize(gguf.quantize(llama_weights()[name], GgmlType.Q4_1), GgmlType.Q4_1)
    assert weights[name].dtype == torch.float16
    np.testing.assert_allclose(weights[name].float().numpy(), reference, rtol=2**-11, atol=2**-24)
    assert weights["model.norm.weight"].dtype == torch.float32
    assert json.loads((directory / "config.json").read_text())["torch_dtype"] == "float16"


def test_widened_norms_are_narrowed_only_where_nothing_is_lost(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model.gguf", GgmlType.F32)
    exact, inexact = np.float32(1.0078125).tobytes(), np.float32(1.0000001).tobytes()
    with GgufFile(path) as file:
        info = file.tensors["output_norm.weight"]
    for first, dtype in ((exact, torch.float16), (inexact, torch.float32)):
        data = bytearray(path.read_bytes())
        data[info.offset : info.offset + info.num_bytes] = first + exact * (HIDDEN - 1)
        path.write_bytes(data)
        convert_gguf(path, tmp_path)
        norm = load_file(tmp_path / "model.safetensors")["model.norm.weight"]
        assert norm.dtype == dtype
        assert norm[0].item() == np.frombuffer(first, np.float32)[0]


def test_config_describes_the_model_in_hugging_faces_words(tmp_path: Path) -> None:
    config = json.loads((converted(tmp_path, GgmlType.F32) / "config.json").read_text())
    wanted = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in wanted} == wanted


def test_rebuilt_tokenizer_splits_digits_and_keeps_special_tokens(tmp_path: Path) -> None:
    directory = converted(tmp_path, GgmlType.F32)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    encoding = tokenizer.encode("<|im_start|>hello 12<|im_end|>")
    # "1 2" is a merge, but the smollm pre-tokenizer has already put digits apart.
    assert encoding.tokens == ["<|im_start|>", "hell", "o", "Ġ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(encoding.ids) == "hello 12"
    assert (directory / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"
    assert json.loads((directory / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"


def test_beginning_token_of_the_file_is_put_before_every_text(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model.gguf", GgmlType.F32, lambda writer: writer.add_add_bos_token(True))
    convert_gguf(path, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("hello").tokens == ["<|im_start|>", "hell", "o"]


def test_second_end_token_is_read_too(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model.gguf", GgmlType.F32, lambda writer: writer.add_eot_token_id(0))
    convert_gguf(path, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def add_stray_tensor(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("blk.0.attn_gate.weight", np.ones((2, 32), np.float32))


CHANGES: list[tuple[Callable[[gguf.GGUFWriter], None], str]] = [
    (lambda writer: writer.add_tokenizer_pre("deepseek-llm"), "pre-tokenizer 'deepseek-llm'; known are"),
    (lambda writer: writer.add_string("general.architecture", "rwkv"), "architecture 'rwkv'"),
    (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN), "scales its rotary"),
    (lambda writer: writer.add_rope_dimension_count(8), "rotates 8 of 16"),
    (lambda writer: writer.add_add_eos_token(True), "EOS"),
    (lambda writer: writer.add_block_count(2**30), "lacks"),
    (lambda writer: writer.add_head_count(2**31), "expected 1 to 2,147,483,647"),
    (lambda writer: writer.add_head_count_kv(3), "rows for 3 heads"),
    (lambda writer: writer.add_token_merges(["h e", "q"]), "merge 1 is 'q'"),
    (lambda writer: writer.add_token_types([1] * len(byte_level_tokens()[:-1]) + [6]), "types \\['6'\\]"),
    (lambda writer: writer.add_block_count(2), "lacks 9 tensors"),
    (lambda writer: writer.add_float32("llama.block_count", 1.0), "llama.block_count' is 1.0, expected int"),
    (lambda writer: writer.add_token_types([1]), "1 token types"),
    (add_stray_tensor, "'blk.0.attn_gate.weight' has no place"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES)
def test_what_the_conversion_does_not_understand_is_refused_by_name(
    tmp_path: Path, change: Callable[[gguf.GGUFWriter], None], reason: str
) -> None:
    path = write_llama(tmp_path / "model.gguf", GgmlType.F32, change)
    with pytest.raises(CheckpointError, match=reason):
        convert_gguf(path, tmp_path)
