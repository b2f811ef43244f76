"""The search for a budget on a tiny model: real walks, real trials, and nothing left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from quant import quantize_directory, texts
from quant.budget_search import rung_options
from quant.errors import QuantizationError
from quant.gptq import GptqOptions
from quant.layer_files import WorkDirectory
from quant.options import LinearChoice, QuantizeOptions
from quant.progress import SilentProgress
from quant.quantize_directory import OverBudgetError, quantize_with
from quant.report import QuantizationReport
from tests.quant.tiny_models import TinyAccess, tiny_decoder, write_source

pytestmark = pytest.mark.unit

OPTIONS = QuantizeOptions(samples=8, seq_len=64)


@pytest.fixture(autouse=True)
def short_held_out_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "HELD_OUT_TOKENS", 512)
    monkeypatch.setattr(texts, "HELD_OUT_SEQ_LEN", 64)


def quantize(source: Path, out: Path, limit: float | None = None) -> QuantizationReport:
    options = replace(OPTIONS, max_perplexity_increase=limit)
    return quantize_with(TinyAccess(serves=False), source, out, options, SilentProgress())


def test_the_linears_that_need_it_get_eight_bits_until_the_budget_holds(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    four = quantize(source, tmp_path / "four")
    limit = four.perplexity_increase_percent / 2
    report = quantize(source, tmp_path / "out", limit)
    assert report.perplexity_increase_percent <= limit
    bits = [linear.bits for layer in report.layers for linear in layer.linears]
    assert set(bits) == {4, 8}
    assert four.quantized_bytes < report.quantized_bytes < 2 * four.quantized_bytes
    # The first trial takes every linear from the walk that the four-bit result came from: it must measure the same.
    assert report.budget_trials[0].refined == 0
    assert report.budget_trials[0].increase_percent == pytest.approx(four.perplexity_increase_percent, abs=1e-3)
    assert report.budget_trials[1].refined == len(bits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["four", "out", "source"]
    assert "Search for at most" in (tmp_path / "out/quantization_report.md").read_text()
    dynamic = json.loads((tmp_path / "out/quantize_config.json").read_text())["dynamic"]
    assert dynamic


def test_a_budget_that_holds_already_changes_nothing(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    without, within = quantize(source, tmp_path / "without"), quantize(source, tmp_path / "within", 50.0)
    assert within.budget_trials == ()
    files = [tmp_path / name / "model.safetensors" for name in ("without", "within")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert without.layers == within.layers
    assert "kept without refining any linear" in (tmp_path / "within/quantization_report.md").read_text()


def test_a_budget_out_of_reach_is_an_error_with_the_best_figure_and_leaves_nothing(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    with pytest.raises(QuantizationError, match=r"within -5 %: the best that was reached is .* with 14 linears"):
        quantize(source, tmp_path / "out", -5.0)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_result_that_misses_the_limit_is_made_again_with_a_lower_aim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_refined: list[int] = []

    def refuse_twice(report: QuantizationReport, work: WorkDirectory) -> None:
        num_refined.append(sum(linear.bits == 8 for layer in report.layers for linear in layer.linears))
        if len(num_refined) <= 2:
            raise OverBudgetError(report, 0.2, work.path)

    monkeypatch.setattr(quantize_directory, "_refuse_bad_quality", refuse_twice)
    quantize(write_source(tmp_path / "source"), tmp_path / "out", 0.2)
    assert len(num_refined) == 3
    assert 0 == num_refined[0] < num_refined[1] < num_refined[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize(
    ("group_size", "bits", "expected"),
    [
        (32, 4, [(4, 32), (8, 32)]),
        (-1, 4, [(4, -1), (4, 32), (8, -1)]),
        (-1, 8, [(8, -1), (8, 32)]),
        (32, 8, [(8, 32)]),
    ],
)
def test_a_linear_climbs_by_a_smaller_group_then_by_eight_bits(
    group_size: int, bits: int, expected: list[tuple[int, int]]
) -> None:
    options = replace(OPTIONS, gptq=GptqOptions(bits=bits, group_size=group_size))
    found = [one.choice_of("model.layers.0.mlp.up_proj") for one in rung_options(options, tiny_decoder().layers[0])]
    assert found == [LinearChoice(*choice) for choice in expected]
