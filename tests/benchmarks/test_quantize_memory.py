"""The checkpoint of headers and holes, and what is planned for models that no test could quantise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.quantize_memory import Shape, plan_only, write_hollow_checkpoint, write_random_checkpoint
from quant.formats.tensor_files import TensorFile
from serving.model.layer_source import DirectoryLayers

pytestmark = pytest.mark.unit

EIGHT_BILLION = Shape(layers=32, hidden=4096, inner=14336, heads=32, kv_heads=8, vocab=128_256)


def test_eight_billion_parameters_are_planned_within_the_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = plan_only(EIGHT_BILLION, 128, 512, tmp_path)
    assert 7e9 < record["parameters"] < 9e9
    assert record["planned_over_bound"] <= 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[::2]] == ["memory", "disk", "time"]


def test_a_hollow_checkpoint_takes_no_disk_and_has_the_form_of_a_real_one(tmp_path: Path) -> None:
    shape = Shape(layers=2, hidden=64, inner=96, heads=4, kv_heads=2, vocab=128)
    write_hollow_checkpoint(tmp_path / "hollow", shape)
    write_random_checkpoint(tmp_path / "real", shape)
    hollow, real = DirectoryLayers(tmp_path / "hollow"), DirectoryLayers(tmp_path / "real")
    assert hollow.layer_bytes(1) == real.layer_bytes(1) == 2 * shape.layer_parameters
    assert hollow.end_bytes() == real.end_bytes()
    file = TensorFile(tmp_path / "hollow/layer-00001.safetensors")
    assert not torch.any(file.read("model.layers.1.mlp.down_proj.weight"))
    write_hollow_checkpoint(tmp_path / "large", EIGHT_BILLION)
    assert sum(path.stat().st_blocks for path in (tmp_path / "large").iterdir()) * 512 < 10**7
