"""Directories whose weights are pickled are refused by name, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from quant.errors import CheckpointError
from quant.formats.autogptq import locate_tensors
from quant.formats.pickled import pickled_hint
from serving.model import weights

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", ["gptq_model-4bit-128g.pt", "model-GPTQ.bin", "llama7b-4bit.pth"])
def test_gptq_file_is_named_with_how_to_save_it_as_safetensors(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02")
    for locate in (locate_tensors, weights.locate_tensors):
        with pytest.raises(CheckpointError, match=rf"{name} is a pickled GPTQ file.*use_safetensors=True"):
            locate(tmp_path)


def test_settings_beside_the_file_tell_that_it_is_quantised(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert "is pickled, which is never read: convert it" in pickled_hint(tmp_path)
    (tmp_path / "quantize_config.json").write_text("{}")
    assert "pickled GPTQ file" in pickled_hint(tmp_path)


def test_nothing_is_said_where_nothing_is_pickled(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"\x80\x02")
    assert pickled_hint(tmp_path) == ""
