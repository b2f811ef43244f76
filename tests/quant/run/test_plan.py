from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quant.errors import QuantizationError
from quant.formats.tensor_files import TensorFile
from quant.method.gptq import GptqOptions
from quant.options import QuantizeOptions
from quant.progress import SilentProgress
from quant.run import texts
from quant.run.machine import Machine, Rates, measure_rates
from quant.run.model_sizes import LinearSize, ModelSizes, sizes_of
from quant.run.plan import make_plan
from quant.run.plan_costs import memory_bound
from quant.run.quantize_directory import quantize_with
from serving.model.layer_source import DirectoryLayers
from tests.quant.tiny_models import PALM, TinyAccess, write_source

pytestmark = pytest.mark.unit

RATES = Rates(fast_flops=7e11, float32_flops=2.3e11, step_bytes=2e10, operation_seconds=3e-6)
ROOMY = Machine(free_memory_bytes=64 * 10**9, free_disk_bytes=10**12, threads=2, rates=RATES)
OPTIONS = QuantizeOptions(gptq=GptqOptions(group_size=32))


def llama(layers: int, hidden: int, inner: int, vocab: int, kv: int | None = None) -> ModelSizes:
    """kv: width of keys, the hidden size if absent."""
    keys = LinearSize(kv or hidden, hidden, "attention input")
    linears = {
        "self_attn.q_proj": LinearSize(hidden, hidden, "attention input"),
        "self_attn.k_proj": keys,
        "self_attn.v_proj": keys,
        "self_attn.o_proj": LinearSize(hidden, hidden, "self_attn.o_proj"),
        "mlp.gate_proj": LinearSize(inner, hidden, "feed-forward input"),
        "mlp.up_proj": LinearSize(inner, hidden, "feed-forward input"),
        "mlp.down_proj": LinearSize(hidden, inner, "mlp.down_proj"),
    }
    layer_bytes = 2 * sum(linear.weights for linear in linears.values())
    return ModelSizes(layers, hidden, vocab, linears, layer_bytes, 2 * vocab * hidden, 2 * vocab * hidden)


LARGE = llama(32, 4096, 14336, 32_000)
EIGHT_BILLION = llama(32, 4096, 14336, 128_256, 1024)
TINY = llama(30, 576, 1536, 49_152, 192)
SMALL = llama(24, 2048, 5632, 32_000)


def test_a_model_of_a_billion_is_planned_within_the_bound() -> None:
    few = replace(OPTIONS, samples=4)
    plan = make_plan(SMALL, few, ROOMY)
    assert plan.peak_memory_bytes < memory_bound(SMALL, few)
    assert not plan.measures_speed


@pytest.mark.parametrize("sizes", [EIGHT_BILLION, LARGE], ids=["few key heads", "many key heads"])
def test_a_model_of_eight_billion_is_planned_within_the_bound(sizes: ModelSizes) -> None:
    assert sizes.num_layers * sizes.layer_weights > 6.9e9
    assert make_plan(sizes, OPTIONS, ROOMY).peak_memory_bytes < memory_bound(sizes, OPTIONS)


def test_an_engine_decodes_for_its_speed_where_that_needs_no_more_than_the_rest_may() -> None:
    assert make_plan(TINY, OPTIONS, ROOMY).measures_speed
    assert not make_plan(TINY, replace(OPTIONS, measures_speed=False), ROOMY).measures_speed
    assert not make_plan(EIGHT_BILLION, OPTIONS, ROOMY).measures_speed


def test_a_machine_without_room_for_engines_is_planned_without_their_speed() -> None:
    need = max(part.amount for part in make_plan(TINY, OPTIONS, ROOMY).memory[:2])
    plan = make_plan(TINY, OPTIONS, replace(ROOMY, free_memory_bytes=int(need / 0.94)))
    assert plan.refusal is None
    assert not plan.measures_speed


def test_a_model_several_times_larger_than_memory_is_planned_to_fit() -> None:
    assert make_plan(LARGE, replace(OPTIONS, samples=16), ROOMY).peak_memory_bytes < LARGE.source_bytes / 3


def test_more_calibration_text_takes_more_memory_time_and_disk() -> None:
    plan, more = (make_plan(SMALL, replace(OPTIONS, samples=samples), ROOMY) for samples in (128, 512))
    tokens = (512 - 128) * 512
    # In memory what enters a layer and one more as wide; the widest waits in a file.
    assert more.peak_memory_bytes > plan.peak_memory_bytes + tokens * 2 * 2048 * 2 * 0.9
    assert more.peak_memory_bytes < plan.peak_memory_bytes + tokens * 5632 * 2
    assert more.seconds > plan.seconds
    assert more.disk_bytes == plan.disk_bytes + tokens * 5632 * 2


def test_a_parallel_layer_keeps_what_attention_has_mixed_to_its_end() -> None:
    few, many = (replace(OPTIONS, samples=samples) for samples in (1024, 2048))
    rises = [
        make_plan(sizes, many, ROOMY).peak_memory_bytes - make_plan(sizes, few, ROOMY).peak_memory_bytes
        for sizes in (SMALL, replace(SMALL, is_parallel=True))
    ]
    token_state = 1024 * 512 * 2 * 2048
    assert rises == pytest.approx([2 * token_state, 3 * token_state], rel=0.05)


def test_a_slower_machine_takes_longer_in_proportion() -> None:
    half = Rates(RATES.fast_flops / 2, RATES.float32_flops / 2, RATES.step_bytes / 2, RATES.operation_seconds * 2)
    slow = replace(ROOMY, rates=half)
    plan, slower = make_plan(SMALL, OPTIONS, ROOMY), make_plan(SMALL, OPTIONS, slow)
    for part, slow_part in zip(plan.time[:2], slower.time[:2], strict=True):
        assert slow_part.amount == pytest.approx(2 * part.amount)


def test_too_little_memory_is_refused_with_a_number_of_samples_that_fits() -> None:
    many = replace(OPTIONS, samples=512)
    need = make_plan(SMALL, many, ROOMY).peak_memory_bytes
    tight = replace(ROOMY, free_memory_bytes=int(need * 0.8))
    refusal = make_plan(SMALL, many, tight).refusal
    assert refusal is not None
    found = re.fullmatch(r"quantising would take .* GB of memory, .* are free; --samples (\d+) would fit", refusal)
    assert found is not None
    assert make_plan(SMALL, replace(many, samples=int(found.group(1))), tight).refusal is None


def test_a_machine_too_small_for_any_text_is_told_so() -> None:
    tiny = replace(ROOMY, free_memory_bytes=500 * 10**6)
    assert "even without calibration text it would take" in str(make_plan(LARGE, OPTIONS, tiny).refusal)


def test_too_little_disk_is_refused_with_another_place_to_go() -> None:
    refusal = str(make_plan(LARGE, OPTIONS, replace(ROOMY, free_disk_bytes=10**9)).refusal)
    assert "of disk, 1.0 GB are free there; give an OUT on another disk" in refusal


def test_an_adapter_takes_disk_for_the_merged_model() -> None:
    plain, merging = (make_plan(SMALL, OPTIONS, ROOMY, merges_adapter=merges) for merges in (False, True))
    assert merging.disk_bytes == plain.disk_bytes + SMALL.source_bytes
    assert merging.memory == plain.memory


def test_a_perplexity_budget_adds_the_most_that_its_search_may_take() -> None:
    wide = replace(OPTIONS, gptq=GptqOptions(group_size=128))
    plain = make_plan(SMALL, wide, ROOMY)
    searching = make_plan(SMALL, replace(wide, max_perplexity_increase=2.0), ROOMY)
    assert plain.search_seconds is None
    assert searching.search_seconds is not None
    # A second walk, a short one in 8 bits and a mixture; and the time without a search stays what it was.
    walk = {part.name: part.amount for part in plain.time}["quantising"]
    assert searching.search_seconds > walk
    assert searching.seconds == plain.seconds
    assert searching.disk_bytes > plain.disk_bytes + 2 * SMALL.num_layers * SMALL.layer_weights
    assert searching.lines[-1].endswith("more if the perplexity budget is missed")


def no_layer(layers: DirectoryLayers, index: int) -> torch.nn.Module:
    pytest.fail(f"layer {index} was read")


def test_a_run_that_does_not_fit_stops_before_it_reads_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "source")
    monkeypatch.setattr("quant.run.machine.free_memory_bytes", lambda: 10**8)
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
    monkeypatch.setattr("quant.report.plot.is_plot_possible", lambda: False)
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
    lines = make_plan(LARGE, replace(OPTIONS, max_perplexity_increase=2.0), ROOMY).lines
    assert max(map(len, lines)) <= 80
    memory, _, disk, _, seconds, _, _ = lines
    assert re.fullmatch(r"memory  about \d\.\d GB at the peak; 64\.0 GB are free", memory)
    assert re.fullmatch(r"disk    about [\d.]+ GB; 1,000\.0 GB are free", disk)
    assert re.fullmatch(r"time    about [\d.]+ (min|h), within a factor of 1\.5 on an idle machine", seconds)
