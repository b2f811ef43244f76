"""The header check: it agrees with the safetensors library on whole files, and refuses every kind of broken one."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from quant.errors import CheckpointError
from quant.formats.safetensors_header import MAX_HEADER_BYTES, check_safetensors

pytestmark = pytest.mark.unit

# A refusal quotes the header, which is parsed whole; what the header asks for is never allocated.
MEMORY_LIMIT = 8 * 2**20
SMALL_TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.zeros(4, dtype=torch.int32),
    "empty": torch.empty(0, dtype=torch.float16),
    "scalar": torch.tensor(1.0, dtype=torch.bfloat16),
}


SMALL_FILE = save(SMALL_TENSORS, metadata={"format": "pt"})


def with_header(text: str | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensor(start: int, end: int, shape: object = None, dtype: object = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def test_header_says_what_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    path.write_bytes(SMALL_FILE)
    header = check_safetensors(path)
    assert header.metadata == {"format": "pt"}
    with safe_open(path, framework="pt") as file:
        assert header.tensors.keys() == set(file.keys())
        for name, stored in header.tensors.items():
            part = file.get_slice(name)
            assert (list(stored.shape), stored.dtype) == (part.get_shape(), part.get_dtype())
    raw = path.read_bytes()
    for name, expected in SMALL_TENSORS.items():
        stored = header.tensors[name]
        assert raw[stored.start : stored.end] == expected.view(-1).view(torch.uint8).numpy().tobytes()


BROKEN: list[tuple[bytes, str]] = [
    (b"", "it has 0 bytes"),
    (b"\x01\x02", "it has 2 bytes"),
    (with_header("{}", length=2**63), "claims 9,223,372,036,854,775,808 bytes, the whole file has 10"),
    (with_header("[]"), "JSON list, expected an object"),
    (with_header("{"), "not JSON"),
    (with_header(b"\xff\xfe{}"), "not JSON"),
    (with_header("[" * 100_000), "not JSON"),
    (with_header('{"a": ' + "9" * 10_000 + "}"), "not JSON"),
    (with_header('{"__metadata__": {"a": 1}}'), "'a' is 1, expected a string"),
    (with_header('{"__metadata__": []}'), "expected an object of strings"),
    (with_header('{"a": 3}'), "expected its dtype, shape and data_offsets"),
    (with_header(json.dumps({"a": tensor(0, 1)})[:-1] + ', "a": null}', b"1"), "names 'a' twice"),
    (with_header('{"a": {"dtype": "U8", "dtype": "U8"}}'), "names 'dtype' twice"),
    (with_header(json.dumps({"a": tensor(0, 4)}), b"123"), "end at byte 72, the file at byte 71"),
    (with_header(json.dumps({"a": tensor(0, 2)}), b"123"), "end at byte 70, the file at byte 71"),
    (with_header(json.dumps({"a": tensor(0, 2), "b": tensor(1, 3)}), b"123"), "'b' overlaps"),
    (with_header(json.dumps({"a": tensor(0, 1), "b": tensor(2, 3)}), b"123"), "'b' follows bytes of no tensor"),
    (with_header(json.dumps({"a": tensor(3, 0, [3])}), b"123"), "its data_offsets give it -3"),
    (with_header(json.dumps({"a": tensor(-1, 2)}), b"123"), "expected two"),
    (with_header(json.dumps({"a": {**tensor(0, 3), "data_offsets": [3]}}), b"123"), "expected two"),
    (with_header(json.dumps({"a": tensor(0, 3, [2**32, 2**32])}), b"123"), "no tensor can have"),
    (with_header(json.dumps({"a": tensor(0, 0, [0, 2**62])})), "no tensor can have"),
    (with_header(json.dumps({"a": tensor(0, 1, [1] * 9)}), b"1"), "no tensor can have"),
    (with_header(json.dumps({"a": tensor(0, 1, [True])}), b"1"), "no tensor can have"),
    (with_header(json.dumps({"a": tensor(0, 1, [1.0])}), b"1"), "no tensor can have"),
    (with_header(json.dumps({"a": tensor(0, 3, [3], "F32")}), b"123"), "needs 12 bytes, its data_offsets give it 3"),
    (with_header(json.dumps({"a": tensor(0, 3, [3], "Q9")}), b"123"), "dtype 'Q9', which is not known"),
    (with_header(json.dumps({"a": tensor(0, 3, [3], ["U8"])}), b"123"), "which is not known"),
]


@pytest.mark.parametrize(("content", "reason"), BROKEN)
def test_broken_file_is_refused_with_what_was_wrong(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        check_safetensors(path)


def test_header_above_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(2 * MAX_HEADER_BYTES)  # sparse: takes no disk
    assert_refused_or_read(path)


def assert_refused_or_read(path: Path) -> None:
    """Nothing but a header or a CheckpointError comes out, and in little memory."""
    tracemalloc.start()
    try:
        check_safetensors(path)
    except CheckpointError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MEMORY_LIMIT


NUMBERS = st.sampled_from([0, 1, 2, 4, 8, 16, 32, 33, -1, -(2**63), 2**31, 2**62, 2**64, 1e400, 4.0, None, True, "8"])
SHAPES = st.one_of(NUMBERS, st.lists(NUMBERS, max_size=9))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4),
    cut=st.integers(0, 60),
)
@example(edits=[(0, b"\xff" * 8)], cut=0)
def test_mutated_file_is_read_or_refused_in_little_memory(
    tmp_path: Path, edits: list[tuple[int, bytes]], cut: int
) -> None:
    path = tmp_path / "mutated.safetensors"
    raw = bytearray(SMALL_FILE)
    for position, change in edits:
        raw[position : position + len(change)] = change
    path.write_bytes(raw[: len(raw) - cut])
    assert_refused_or_read(path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=SHAPES,
    offsets=st.lists(NUMBERS, max_size=3),
    dtype=st.sampled_from(["F32", "I32", "U8", "F16", "F99", "", None, 4]),
)
def test_whatever_passes_can_be_read_by_the_library(
    tmp_path: Path, shape: object, offsets: list[object], dtype: object
) -> None:
    path = tmp_path / "file.safetensors"
    fields = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    path.write_bytes(with_header(json.dumps({"a": fields}), bytes(32)))
    try:
        header = check_safetensors(path)
    except CheckpointError:
        return
    with safe_open(path, framework="pt") as file:
        assert tuple(file.get_tensor("a").shape) == header.tensors["a"].shape


def test_every_single_damaged_header_byte_is_survived(tmp_path: Path) -> None:
    path = tmp_path / "damaged.safetensors"
    for at in range(0, 200, 3):
        path.write_bytes(SMALL_FILE[:at] + bytes([SMALL_FILE[at] ^ 0x15]) + SMALL_FILE[at + 1 :])
        assert_refused_or_read(path)
