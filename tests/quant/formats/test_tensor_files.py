from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.errors import CheckpointError
from quant.formats import tensor_files
from quant.formats.tensor_files import TensorFile, TensorToWrite, as_stored, held, write_tensors

pytestmark = pytest.mark.unit


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "wide": torch.randn((7, 5), generator=generator),
        "half": torch.randn((3, 4, 2), generator=generator).to(torch.bfloat16),
        "codes": torch.randint(0, 255, (9,), generator=generator, dtype=torch.uint8),
        "words": torch.arange(6, dtype=torch.int32).view(2, 3),
        "single": torch.tensor(3.5),
        "empty": torch.empty((0, 4)),
    }


def test_what_is_written_is_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_tensors(
        tmp_path / "a.safetensors", [held(name, tensor) for name, tensor in tensors.items()], {"format": "pt"}
    )
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


def test_what_the_library_writes_is_read_whole_and_by_rows(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "a.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(file.read(name), tensor)
    assert torch.equal(file.rows("half", 1, 3), tensors["half"][1:3])
    assert torch.equal(file.gather("half", [2, 0, 2]), tensors["half"][[2, 0, 2]])
    assert file.gather("wide", []).shape == (0, 5)
    assert file.metadata == {"format": "pt"}


def test_copies_in_short_runs_are_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "_RUN_BYTES", 16)
    tensors = some_tensors()
    save_file(tensors, tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    write_tensors(tmp_path / "b.safetensors", [as_stored(file, name) for name in tensors], {})
    found = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_that_is_other_than_announced_is_refused(tmp_path: Path) -> None:
    wrong = TensorToWrite("w", torch.float32, (4, 2), lambda first, last: torch.zeros((last - first, 3)))
    with pytest.raises(ValueError, match="w was announced as"):
        write_tensors(tmp_path / "a.safetensors", [wrong], {})


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(some_tensors(), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        TensorFile(path)
