"""What single units do to the predictions, against whole models compared one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quant.budget import harm as budget_harm
from quant.budget.harm import HARM_TOKENS, HARM_WINDOWS, measure_harm
from quant.budget.order import Unit
from quant.budget.search import units_of
from quant.formats.checkpoint_format import CheckpointFormat
from quant.formats.checkpoint_names import checkpoint_names
from quant.method.gptq import GptqOptions
from quant.options import LinearChoice
from quant.progress import SilentProgress
from quant.walk.layer_files import WorkDirectory
from quant.walk.layer_walk import insert_matrices, quantize_to_disk, settle_group_size
from serving.model.layer_source import DirectoryLayers
from serving.model.weights import load_decoder
from tests.quant.tiny_models import BLOOM, CONFIG, tiny_ids, write_source

pytestmark = pytest.mark.unit


def walk(folder: Path, **changes: object) -> tuple[DirectoryLayers, WorkDirectory, list[Unit]]:
    """A source, its 4-bit walk, and units that can be refined."""
    layers = DirectoryLayers(write_source(folder / "source", torch.float32, **changes))
    options = settle_group_size(layers, GptqOptions())
    (folder / "work").mkdir()
    work = WorkDirectory(folder / "work", checkpoint_names({**CONFIG, **changes}), CheckpointFormat.V1)
    choice = LinearChoice(4, options.group_size)
    reports = quantize_to_disk(layers, tiny_ids(8, 64), options, lambda _: choice, work, SilentProgress())
    finer = [
        replace(report, linears=tuple(replace(linear, bits=8, error=0.0) for linear in report.linears))
        for report in reports
    ]
    return layers, work, units_of([reports, finer], layers.outline())


def divergence_of(source: Path, work: WorkDirectory, unit: Unit, windows: torch.Tensor) -> float:
    """The same by a whole model in memory."""
    decoder, plain = load_decoder(source), load_decoder(source)
    index = int(unit.names[0].split(".")[2])
    matrices = {name: matrix for name, matrix in work.matrices(index).items() if name in unit.names}
    insert_matrices(decoder.layers[index], f"model.layers.{index}", matrices)
    with torch.inference_mode():
        expected, found = (torch.log_softmax(model(windows), dim=-1) for model in (plain, decoder))
    return float(((expected - found) * expected.exp()).sum(-1).mean())


@pytest.mark.parametrize("changes", [{}, BLOOM], ids=["llama", "bloom"])
@pytest.mark.parametrize("units_of_a_pass", [3, 100])
def test_harm_is_that_of_a_model_with_one_unit_quantised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], units_of_a_pass: int
) -> None:
    monkeypatch.setattr(budget_harm, "UNITS_OF_A_PASS", units_of_a_pass)
    layers, work, units = walk(tmp_path, **changes)
    calibration = tiny_ids(4, 160, seed=1)
    found = measure_harm(layers, work, units, calibration, SilentProgress())
    windows = calibration[:HARM_WINDOWS, :HARM_TOKENS]
    expected = [divergence_of(tmp_path / "source", work, unit, windows) for unit in units]
    assert found == pytest.approx(expected, rel=0.01, abs=1e-7)
    assert min(found) > 0


def test_units_that_cannot_be_refined_are_not_measured(tmp_path: Path) -> None:
    layers, work, units = walk(tmp_path)
    units[1] = replace(units[1], rungs=units[1].rungs[:1])
    found = measure_harm(layers, work, units, tiny_ids(2, 64), SilentProgress())
    assert [harm == 0.0 for harm in found] == [place == 1 for place in range(len(units))]
