from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quant import texts
from quant.errors import QuantizationError
from quant.formats.tensor_files import TensorFile
from quant.gptq import GptqOptions
from quant.options import QuantizeOptions
from quant.plan import (
    LinearSize,
    Machine,
    ModelSizes,
    Rates,
    make_plan,
    measure_rates,
    memory_bound,
    refuse_if_too_large,
    sizes_of,
)
from quant.progress import SilentProgress
from quant.quantize_directory import quantize_with
from serving.model.layer_source import DirectoryLayers
from tests.quant.tiny_models import PALM, TinyAccess, write_source

pytestmark = pytest.mark.unit

RATES = Rates(fast_flops=7e11, float32_flops=2.3e11, step_bytes=2e10, operation_seconds=3e-6)
ROOMY = Machine(free_memory_bytes=64 * 10**9, free_disk_bytes=10**12, threads=2, rates=RATES)
OPTIONS = QuantizeOptions(gptq=GptqOptions(group_size=32))


def llama(layers: int, hidden: int, inner: int, vocab: int) -> ModelSizes:
    attention = {f"self_attn.{name}_proj": LinearSize(hidden, hidden, "attention input") for name in "qkv"}
    linears = {
        **attention,
        "self_attn.o_proj": LinearSize(hidden, hidden, "o_proj"),
        "mlp.gate_proj": LinearSize(inner, hidden, "feed-forward input"),
        "mlp.up_proj": LinearSize(inner, hidden, "feed-forward input"),
        "mlp.down_proj": LinearSize(hidden, inner, "down_proj"),
    }
    layer_bytes = 2 * sum(linear.weights for linear in linears.values())
    return ModelSizes(layers, hidden, vocab, linears, layer_bytes, 2 * vocab * hidden, 2 * vocab * hidden)


LARGE = llama(32, 4096, 14336, 32_000)
SMALL = llama(24, 2048, 5632, 32_000)


def test_a_model_of_a_billion_is_planned_within_the_bound() -> None:
    few = replace(OPTIONS, samples=4)
    plan = make_plan(SMALL, few, ROOMY)
    assert plan.peak_memory_bytes < memory_bound(SMALL, few)
    assert not plan.measures_serving


def test_a_model_several_times_larger_than_memory_is_planned_to_fit() -> None:
    assert make_plan(LARGE, replace(OPTIONS, samples=16), ROOMY).peak_memory_bytes < LARGE.source_bytes / 3


def test_more_calibration_text_takes_more_memory_and_time_and_no_more_disk() -> None:
    plan, more = (make_plan(SMALL, replace(OPTIONS, samples=samples), ROOMY) for samples in (128, 512))
    assert more.peak_memory_bytes > plan.peak_memory_bytes + 128 * 3 * 512 * (2048 + 5632) * 2 * 0.9
    assert more.seconds > plan.seconds
    assert more.disk_bytes == plan.disk_bytes


def test_a_slower_machine_takes_longer_in_proportion() -> None:
    half = Rates(RATES.fast_flops / 2, RATES.float32_flops / 2, RATES.step_bytes / 2, RATES.operation_seconds * 2)
    slow = replace(ROOMY, rates=half)
    assert make_plan(SMALL, OPTIONS, slow).seconds == pytest.approx(2 * make_plan(SMALL, OPTIONS, ROOMY).seconds)


def test_too_little_memory_is_refused_with_a_number_of_samples_that_fits() -> None:
    need = make_plan(SMALL, OPTIONS, ROOMY).peak_memory_bytes
    tight = replace(ROOMY, free_memory_bytes=int(need * 0.8))
    with pytest.raises(
        QuantizationError, match=r"would take .* GB of memory, .* are free; --samples \d+ would fit"
    ) as raised:
        refuse_if_too_large(SMALL, OPTIONS, tight)
    found = re.search(r"--samples (\d+)", str(raised.value))
    assert found is not None
    refuse_if_too_large(SMALL, replace(OPTIONS, samples=int(found.group(1))), tight)


def test_a_machine_too_small_for_any_text_is_told_so() -> None:
    tiny = replace(ROOMY, free_memory_bytes=500 * 10**6)
    with pytest.raises(QuantizationError, match="even without calibration text it would take"):
        refuse_if_too_large(LARGE, OPTIONS, tiny)


def test_too_little_disk_is_refused_with_another_place_to_go() -> None:
    with pytest.raises(QuantizationError, match=r"of disk, 1\.0 GB are free there; give an OUT on another disk"):
        refuse_if_too_large(LARGE, OPTIONS, replace(ROOMY, free_disk_bytes=10**9))


def no_layer(layers: DirectoryLayers, index: int) -> torch.nn.Module:
    pytest.fail(f"layer {index} was read")


def test_a_run_that_does_not_fit_stops_before_it_reads_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "source")
    monkeypatch.setattr("quant.plan.free_memory_bytes", lambda: 10**8)
    monkeypatch.setattr(DirectoryLayers, "layer", no_layer)
    with pytest.raises(QuantizationError, match=r"(100|95) MB"):
        quantize_with(TinyAccess(), source, tmp_path / "out", QuantizeOptions(samples=8, seq_len=64), SilentProgress())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("form", [{}, PALM], ids=["sequential", "parallel"])
def test_disk_is_planned_as_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: dict[str, object]
) -> None:
    monkeypatch.setattr(texts, "HELD_OUT_TOKENS", 64)
    monkeypatch.setattr(texts, "HELD_OUT_SEQ_LEN", 64)
    monkeypatch.setattr("quant.report_plot.is_plot_possible", lambda: False)
    source = write_source(tmp_path / "source", torch.float16, **form)
    options = QuantizeOptions(samples=8, seq_len=64, gptq=GptqOptions(group_size=32))
    planned = make_plan(sizes_of(DirectoryLayers(source)), options, ROOMY)
    quantize_with(TinyAccess(serves=False), source, tmp_path / "out", options, SilentProgress())
    file = TensorFile(tmp_path / "out/model.safetensors")
    stored = sum(tensor.end - tensor.start for tensor in file.tensors.values())
    assert {part.name: part.amount for part in planned.disk}["result"] == pytest.approx(stored, rel=0.05)


def test_rates_are_counted_by_the_clock() -> None:
    def ticks() -> Iterator[float]:
        now = 0.0
        while True:
            yield now
            now += 1.0

    clock = ticks()
    rates = measure_rates(lambda: next(clock))
    assert rates.float32_flops == 2 * 1024**3
    assert rates.operation_seconds == 1.0


def test_lines_name_peak_disk_and_time() -> None:
    peak, disk, seconds, serving = make_plan(LARGE, OPTIONS, ROOMY).lines
    assert peak.startswith("peak memory about ")
    assert disk.startswith("disk about ")
    assert seconds.startswith("time about ")
    assert "serves is not measured" in serving
