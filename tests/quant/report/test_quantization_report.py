"""The report's figures, its three files, and its summary read back from both versions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from quant.errors import CheckpointError
from quant.model_directory import DataFile
from quant.report import plot as report_plot
from quant.report.measure import Agreement
from quant.report.quantization_report import (
    REPORT_MARKDOWN,
    REPORT_PLOT,
    BudgetTrial,
    DecodeSpeed,
    QuantizationReport,
    TextComparison,
    write_report,
)
from quant.report.summary import REPORT_JSON, read_summary
from quant.report.text import as_markdown
from quant.walk.quantize_model import LayerReport, LinearReport

pytestmark = pytest.mark.unit

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def agreement(perplexity: float, top1: float) -> Agreement:
    return Agreement(perplexity=perplexity, top1_agreement=top1, mean_kl=0.02, kl_p99=0.21)


def layer(index: int) -> LayerReport:
    return LayerReport(
        index,
        tuple(
            LinearReport(
                name=f"model.layers.{index}.{name}",
                bits=8 if (index, name) == (2, "down_proj") else 4,
                group_size=64,
                error=0.002 * (1 + place) * (1 + index),
                damp=0.01,
            )
            for place, name in enumerate(LINEARS)
        ),
    )


WEB = TextComparison(
    name="held_out.jsonl",
    sha256="a" * 64,
    tokens=16_384,
    source_perplexity=10.0,
    plain=agreement(10.4, 0.93),
    served=agreement(10.5, 0.92),
    round_to_nearest=agreement(11.8, 0.81),
)
CHAT = replace(WEB, name="chats.jsonl", sha256="b" * 64, plain=agreement(10.7, 0.95), served=agreement(10.3, 0.94))
REPORT = QuantizationReport(
    source="some-model",
    bits=4,
    eight_bit=(),
    group_size=64,
    symmetric=True,
    act_order="none",
    damp=0.01,
    calibration=DataFile("calibration.jsonl", "c" * 64, 277),
    calibration_windows=128,
    calibration_tokens=65_536,
    texts=(WEB, CHAT),
    layers=tuple(layer(index) for index in range(12)),
    source_bytes=269_000_000,
    quantized_bytes=112_000_000,
    quantize_seconds=61.0,
    total_seconds=118.0,
    peak_memory_bytes=1_200_000_000,
    source_speed=DecodeSpeed(1.2, 61.0, 2),
    quantized_speed=DecodeSpeed(0.8, 244.0, 2),
    budget_percent=8.0,
    budget_trials=(BudgetTrial(0, 60_000_000, 9.5), BudgetTrial(1, 60_900_000, 7.0)),
)
VERSION_1 = {
    "source": "old",
    "bits": 4,
    "eight_bit": [],
    "group_size": 64,
    "symmetric": False,
    "act_order": False,
    "source_perplexity": 10.0,
    "plain": {"perplexity": 10.4, "top1_agreement": 0.93, "mean_kl": 0.02},
    "served": {"perplexity": 10.5, "top1_agreement": 0.92, "mean_kl": 0.03},
    "source_bytes": 269_000_000,
    "quantized_bytes": 112_000_000,
    "perplexity_increase_percent": 5.0,
}


def test_the_worst_text_and_path_counts() -> None:
    assert REPORT.perplexity_increase_percent == pytest.approx(7.0)
    assert REPORT.top1_agreement == 0.92
    assert replace(REPORT, texts=(replace(WEB, served=None),)).perplexity_increase_percent == pytest.approx(4.0)


def test_the_baseline_does_not_count_as_the_result() -> None:
    assert REPORT.top1_agreement > WEB.round_to_nearest.top1_agreement  # type: ignore[union-attr]


def test_markdown_has_every_text_path_and_cost() -> None:
    text = as_markdown(REPORT)
    assert text.startswith("# Quantisation of some-model\n\n4 bits, group size 64, symmetric, 112 MB (source 269 MB)")
    assert "On 16,384 held-out tokens of held_out.jsonl (sha256 aaaaaaaaaaaa):" in text
    assert "of chats.jsonl (sha256 bbbbbbbbbbbb):" in text
    assert "| as served | 10.5000 | +5.00 % | 92.00% | 0.02000 | 0.2100 |" in text
    assert "| round to nearest (baseline) | 11.8000 | +18.00 % |" in text
    assert "| result | 0.8 | 244 | 2 |" in text
    assert "| vLLM (CPU build) | no | it takes one width" in text
    assert "| 1 | 61 MB | +7.00 % |" in text
    assert "calibration.jsonl (sha256 cccccccccccc)" in text
    assert "4.2 (8 bits) |" in text  # layer 2's down_proj


def test_what_was_not_measured_is_not_mentioned() -> None:
    bare = replace(WEB, served=None, round_to_nearest=None)
    report = replace(REPORT, texts=(bare,), source_speed=None, quantized_speed=None, budget_percent=None, layers=())
    text = as_markdown(report)
    for absent in ("as served", "baseline", "tokens/s", "Search for", "Error of each linear"):
        assert absent not in text


def test_options_that_are_not_the_default_are_named() -> None:
    changed = replace(
        REPORT, group_size=-1, act_order="shuffled", head_bits=8, adapter="my-lora", eight_bit=("v_proj",)
    )
    text = as_markdown(changed)
    assert "4 bits (8 for v_proj), one group a row, symmetric, act-order with shuffled groups, head in 8 bits" in text
    assert "The adapter my-lora was merged into the source first." in text


def test_json_holds_all_fields_and_those_that_older_readers_know(tmp_path: Path) -> None:
    (tmp_path / REPORT_JSON).write_text(json.dumps(REPORT.as_record()))
    record = json.loads((tmp_path / REPORT_JSON).read_text())
    assert record["version"] == 2
    assert record["texts"][1]["name"] == "chats.jsonl"
    assert record["texts"][0]["round_to_nearest"]["kl_p99"] == 0.21
    assert record["calibration"]["sha256"] == "c" * 64
    assert record["quantized_speed"]["tokens_per_second"] == 244.0
    assert record["who_loads"][0]["tool"] == "Causerie"
    assert {key: record[key] for key in ("held_out_tokens", "source_perplexity")} == {
        "held_out_tokens": 16_384,
        "source_perplexity": 10.0,
    }
    assert record["served"]["perplexity"] == 10.5


def test_summary_reads_back_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / REPORT_JSON).write_text(json.dumps(REPORT.as_record()))
    summary = read_summary(tmp_path)
    assert summary is not None
    assert summary.line == REPORT.summary
    assert summary.top1_agreement == 0.92


def test_the_perplexities_of_the_summary_are_those_of_the_text_that_lost_most() -> None:
    prose = replace(CHAT, source_perplexity=20.0, plain=agreement(22.0, 0.95), served=agreement(21.0, 0.95))
    assert "perplexity 10.000 -> 10.700 (+7.00 %)" in REPORT.summary
    assert "perplexity 20.000 -> 22.000 (+10.00 %)" in replace(REPORT, texts=(WEB, prose)).summary


def test_summary_of_an_older_report_is_read(tmp_path: Path) -> None:
    (tmp_path / REPORT_JSON).write_text(json.dumps(VERSION_1))
    summary = read_summary(tmp_path)
    assert summary is not None
    assert summary.top1_agreement == 0.92
    assert summary.line == (
        "4 bits, group size 64, asymmetric, 112 MB (source 269 MB): perplexity 10.000 -> 10.500 (+5.00 %), "
        "top-1 agreement 92.0%, mean KL 0.0300 nats"
    )


def test_a_directory_without_a_report_has_no_summary(tmp_path: Path) -> None:
    assert read_summary(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        json.dumps({**VERSION_1, "served": None, "plain": None}),
        json.dumps({**VERSION_1, "top1_agreement": 97.0}),
        json.dumps({**VERSION_1, "source_perplexity": "low"}),
        json.dumps({**VERSION_1, "source_perplexity": 0}),
        json.dumps({**VERSION_1, "texts": "two"}),
    ],
)
def test_a_report_that_is_none_is_an_error_with_what_to_do(tmp_path: Path, content: str) -> None:
    (tmp_path / REPORT_JSON).write_text(content)
    with pytest.raises(CheckpointError, match=r"is not a quantisation report .*quantise the model again"):
        read_summary(tmp_path)


def test_picture_is_small_and_the_same_again(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    for directory in (tmp_path, tmp_path / "again"):
        write_report(directory, REPORT)
    picture = (tmp_path / REPORT_PLOT).read_bytes()
    assert picture == (tmp_path / "again" / REPORT_PLOT).read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 150_000
    assert f"]({REPORT_PLOT})" in (tmp_path / REPORT_MARKDOWN).read_text()


def test_without_matplotlib_there_is_no_picture_and_the_report_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_plot, "is_plot_possible", lambda: False)
    write_report(tmp_path, REPORT)
    assert not (tmp_path / REPORT_PLOT).exists()
    assert REPORT_PLOT not in (tmp_path / REPORT_MARKDOWN).read_text()
