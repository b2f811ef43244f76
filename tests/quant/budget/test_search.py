"""The search for a budget on a tiny model: real walks, real trials, and nothing left behind."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from quant.budget import search as budget_search
from quant.budget.attempts import OverBudgetError
from quant.budget.order import Refinement, Rung, Unit
from quant.budget.search import BudgetSearch, SearchRun, Walked, describe, rung_options, search_cost
from quant.errors import QuantizationError
from quant.formats.checkpoint_format import CheckpointFormat
from quant.formats.checkpoint_names import checkpoint_names
from quant.method.gptq import GptqOptions
from quant.options import LinearChoice, QuantizeOptions
from quant.progress import SilentProgress
from quant.report.quantization_report import QuantizationReport
from quant.run import quantize_directory, texts
from quant.run.quantize_directory import quantize_with
from quant.walk.layer_files import WorkDirectory
from quant.walk.layer_walk import insert_matrices, quantize_to_disk
from quant.walk.quantize_model import CalibrationWalk
from serving.model.layer_source import DirectoryLayers
from serving.model.weights import load_decoder
from tests.quant.tiny_models import CONFIG, TinyAccess, tiny_decoder, tiny_ids, write_source

pytestmark = pytest.mark.unit

OPTIONS = QuantizeOptions(samples=8, seq_len=64)
CHOICES = ((4, 64), (4, 32), (8, 64))


@pytest.fixture(autouse=True)
def short_held_out_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "HELD_OUT_TOKENS", 512)
    monkeypatch.setattr(texts, "HELD_OUT_SEQ_LEN", 64)


def quantize(
    source: Path, out: Path, limit: float | None = None, options: QuantizeOptions = OPTIONS, *, serves: bool = False
) -> QuantizationReport:
    options = replace(options, max_perplexity_increase=limit)
    return quantize_with(TinyAccess(serves=serves), source, out, options, SilentProgress())


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("serves", [False, True])
def test_linears_are_refined_until_the_budget_holds_and_no_further(tmp_path: Path, serves: bool) -> None:
    source = write_source(tmp_path / "source")
    four = quantize(source, tmp_path / "four", serves=serves)
    eight = quantize(source, tmp_path / "eight", options=replace(OPTIONS, gptq=GptqOptions(bits=8)), serves=serves)
    limit = (four.perplexity_increase_percent + eight.perplexity_increase_percent) / 2
    report = quantize(source, tmp_path / "out", limit, serves=serves)
    assert report.perplexity_increase_percent <= limit
    assert {linear.bits for layer in report.layers for linear in layer.linears} == {4, 8}
    assert four.quantized_bytes < report.quantized_bytes < eight.quantized_bytes
    assert report.budget_trials[0].refined == 0
    assert report.budget_trials[0].increase_percent == pytest.approx(four.perplexity_increase_percent, abs=1e-3)
    assert all(text.round_to_nearest is not None for text in report.texts)
    assert names_in(tmp_path) == ["eight", "four", "out", "source"]
    assert "Search for at most" in (tmp_path / "out/quantization_report.md").read_text()
    assert json.loads((tmp_path / "out/quantize_config.json").read_text())["dynamic"]


def test_a_trial_measures_exactly_what_is_written(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    limit = quantize(source, tmp_path / "four").perplexity_increase_percent / 2
    report = quantize(source, tmp_path / "out", limit)
    assert min(trial.increase_percent for trial in report.budget_trials) <= limit
    # Without a serving path to measure there is nothing else to expect.
    keeping = [trial for trial in report.budget_trials if trial.increase_percent <= limit]
    smallest = min(keeping, key=lambda trial: trial.weight_bytes)
    assert report.perplexity_increase_percent == pytest.approx(smallest.increase_percent, abs=1e-4)


def test_a_budget_counts_what_embeddings_of_their_own_cost(tmp_path: Path) -> None:
    source, options = write_source(tmp_path / "source"), replace(OPTIONS, head_bits=8, embedding_bits=8)
    four = quantize(source, tmp_path / "four", options=options)
    limit = four.perplexity_increase_percent / 2
    report = quantize(source, tmp_path / "out", limit, options)
    assert report.embedding_bits == 8
    assert report.perplexity_increase_percent <= limit
    assert report.budget_trials[0].increase_percent == pytest.approx(four.perplexity_increase_percent, abs=1e-3)
    assert names_in(tmp_path) == ["four", "out", "source"]


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
    assert names_in(tmp_path) == ["source"]


def test_a_result_that_misses_the_limit_is_made_again_with_a_lower_aim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    increases: list[float] = []

    def refuse_twice(report: QuantizationReport) -> None:
        increases.append(report.perplexity_increase_percent)
        if len(increases) <= 2:
            raise OverBudgetError(report, 0.2)

    monkeypatch.setattr(quantize_directory, "_refuse_bad_quality", refuse_twice)
    quantize(write_source(tmp_path / "source"), tmp_path / "out", 0.2)
    assert len(increases) == 3
    assert increases == sorted(increases, reverse=True)
    assert names_in(tmp_path) == ["out", "source"]


@pytest.fixture
def search(tmp_path: Path) -> BudgetSearch:
    """Over a tiny model's walks in 4 and in 8 bits."""
    layers = DirectoryLayers(write_source(tmp_path / "source", torch.float32))
    (tmp_path / "work").mkdir()
    work = WorkDirectory(tmp_path / "work", checkpoint_names(CONFIG), CheckpointFormat.V1)
    options = replace(OPTIONS, gptq=GptqOptions(group_size=32))
    calibration, silent = tiny_ids(4, 32), SilentProgress()
    reports = quantize_to_disk(layers, calibration, options.gptq, options.choice_of, work, silent)
    held_out = [tiny_ids(3, 48, seed=1), tiny_ids(2, 48, seed=2)]
    return BudgetSearch(SearchRun(layers, Walked(work, reports), calibration, held_out, options, silent))


def test_a_trial_is_described_by_how_many_linears_are_stored_how() -> None:
    rungs = tuple(Rung(LinearChoice(*choice), walk, 1_000_000, 3.0 - walk) for walk, choice in enumerate(CHOICES))
    units = [Unit((f"{name}.q", f"{name}.k"), rungs) for name in "abc"]
    assert describe(units, ()) == "of 6 linears none refined"
    taken = [Refinement(0, 1, 1.0), Refinement(1, 1, 1.0), Refinement(1, 2, 1.0)]
    assert describe(units, taken) == "of 6 linears 2 at 8 bits, 2 in groups of 32"


def test_a_mixture_takes_each_linear_from_the_walk_of_its_rung(search: BudgetSearch) -> None:
    refined = {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"}
    taken = [step for step in search.order if refined.issuperset(search.units[step.unit].names)]
    mixture = search.mixture(taken)
    for index, report in enumerate(mixture.layers):
        matrices = [walk.work.matrices(index) for walk in (mixture, *search.walks)]
        for linear in report.linears:
            walk = int(linear.name in refined)
            assert linear in search.walks[walk].layers[index].linears
            assert linear.bits == (4, 8)[walk]
            assert torch.equal(matrices[0][linear.name].codes, matrices[1 + walk][linear.name].codes)


def test_a_trial_is_the_loss_of_a_whole_model_with_those_linears(search: BudgetSearch, tmp_path: Path) -> None:
    taken = search.order[:3]
    decoder = load_decoder(tmp_path / "source")
    for index, layer in enumerate(decoder.layers):
        insert_matrices(layer, f"model.layers.{index}", search.mixture(taken).work.matrices(index))
    expected: list[float] = []
    with torch.inference_mode():
        for ids in (tiny_ids(3, 48, seed=1), tiny_ids(2, 48, seed=2)):
            logits = decoder(ids)[:, :-1].flatten(0, 1)
            expected.append(float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())))
    assert search.losses(taken, "") == pytest.approx(expected, abs=1e-5)
    assert search.losses((), "") != pytest.approx(expected, abs=1e-5)


def test_a_mixture_has_what_belongs_to_no_layer_from_the_first_walk(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    base = WorkDirectory(tmp_path / "work", checkpoint_names(CONFIG), CheckpointFormat.V1)
    mixture = base.within("mixture")
    base.file(0).write_bytes(b"base")
    mixture.file(0).write_bytes(b"mixture")
    (base.path / "lm_head.safetensors").write_bytes(b"head")
    for _ in range(2):
        mixture.link_others(base)
    assert mixture.file(0).read_bytes() == b"mixture"
    assert (mixture.path / "lm_head.safetensors").read_bytes() == b"head"
    base.remove()
    assert list(tmp_path.iterdir()) == []


class KilledError(BaseException):
    """Stands for SIGKILL: nothing may rely on being told."""


class Counters:
    """What costs time in a search, by name, and a place to stop at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: dict[str, int] = {"layer": 0, "harm": 0, "trial": 0, "result": 0}
        self.stop_at: tuple[str, int] | None = None
        self._watch(monkeypatch, CalibrationWalk, "quantize_layer", "layer")
        self._watch(monkeypatch, budget_search, "measure_harm", "harm")
        self._watch(monkeypatch, BudgetSearch, "_carry_texts", "trial")
        self._watch(monkeypatch, quantize_directory, "write_checkpoint", "result")

    def _watch(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, counter: str) -> None:
        real = getattr(owner, name)

        def counted(*arguments: object, **named: object) -> object:
            if self.stop_at == (counter, self.counts[counter]):
                self.stop_at = None
                raise KilledError
            self.counts[counter] += 1
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, counted)


@dataclass(frozen=True, slots=True)
class Whole:
    """A search that nothing interrupted. `counts` of what it took, its first walk included."""

    source: Path
    limit: float
    weights: bytes
    counts: dict[str, int]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    source = write_source(folder / "source")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "HELD_OUT_TOKENS", 512)
        patch.setattr(texts, "HELD_OUT_SEQ_LEN", 64)
        limit = quantize(source, folder / "four").perplexity_increase_percent / 2
        counters = Counters(patch)
        quantize(source, folder / "out", limit)
    return Whole(source, limit, (folder / "out/model.safetensors").read_bytes(), counters.counts)


@pytest.mark.parametrize("stop", [("layer", 3), ("harm", 0), ("trial", 0), ("trial", 1), ("result", 1)])
def test_a_search_that_was_killed_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Whole, stop: tuple[str, int]
) -> None:
    counters = Counters(monkeypatch)
    counters.stop_at = stop
    with pytest.raises(KilledError):
        quantize(whole.source, tmp_path / "out", whole.limit)
    assert not (tmp_path / "out").exists()
    quantize(whole.source, tmp_path / "out", whole.limit)
    assert counters.counts == whole.counts
    assert (tmp_path / "out/model.safetensors").read_bytes() == whole.weights
    assert names_in(tmp_path) == ["out"]


def test_progress_says_what_is_tried_and_what_it_gave(tmp_path: Path) -> None:
    stages: list[str] = []

    class Stages(SilentProgress):
        def update(self, stage: str, done: float, total: float) -> None:
            if stage not in stages:
                stages.append(stage)

    source = write_source(tmp_path / "source")
    limit = quantize(source, tmp_path / "four").perplexity_increase_percent / 2
    options = replace(OPTIONS, max_perplexity_increase=limit)
    report = quantize_with(TinyAccess(serves=False), source, tmp_path / "out", options, Stages())
    first = report.budget_trials[1]
    announced = f"trial 1: of 14 linears {first.refined} at 8 bits, {first.weight_bytes / 1e6:,.1f} MB"
    place = stages.index(announced)
    assert stages[place + 1] == f"{announced}: {first.increase_percent:+.2f} %"


@pytest.mark.parametrize(
    ("group_size", "bits", "expected"),
    [
        (32, 4, [(8, 32)]),
        (-1, 4, [(4, 32), (8, -1)]),
        (-1, 8, [(8, 32)]),
        (32, 8, []),
    ],
)
def test_a_linear_climbs_by_a_smaller_group_then_by_eight_bits(
    group_size: int, bits: int, expected: list[tuple[int, int]]
) -> None:
    options = replace(OPTIONS, gptq=GptqOptions(bits=bits, group_size=group_size))
    found = rung_options(options, tiny_decoder().layers[0])
    assert [one.choice_of("model.layers.0.mlp.up_proj") for one in found] == [LinearChoice(*one) for one in expected]
    cost = search_cost(options, [64, 96])
    assert cost.walks + cost.short_walks == len(expected)
    assert len(cost.on_disk) == len(expected) + bool(expected)
