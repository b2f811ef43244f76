"""Head and embeddings in 8 or 4 bits: every reader sees what was quantised, and what cannot be is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.errors import CheckpointError, QuantizationError
from quant.formats.autogptq import open_packed, pack_linear, parse_settings
from quant.formats.autogptq_check import stored_weight
from quant.formats.checkpoint_format import CheckpointFormat
from quant.formats.checkpoint_names import checkpoint_names
from quant.method.gptq import GptqOptions, quantize_matrix, round_to_nearest
from quant.options import QuantizeOptions
from quant.progress import SilentProgress
from quant.report.quantization_report import QuantizationReport
from quant.run import texts
from quant.run.machine import Machine, Rates
from quant.run.model_sizes import sizes_of
from quant.run.plan import make_plan
from quant.run.quantize_directory import quantize_with
from quant.walk import layer_walk
from quant.walk.ends import (
    EMBEDDINGS,
    HEAD,
    SharedHead,
    choose_ends,
    count_lookups,
    quantize_table,
    round_table,
    share_head,
)
from quant.walk.tables import CodedTable, HeldTable
from serving.engine.logits import serving_logits
from serving.engine.prepare import prepare
from serving.model.layer_source import DirectoryLayers
from serving.model.weights import load_decoder
from tests.quant.tiny_models import BLOOM, GPT_NEOX, TinyAccess, write_source

pytestmark = pytest.mark.unit

OPTIONS = QuantizeOptions(samples=4, seq_len=64, measures_prose=False)
UNTIED: dict[str, object] = {"tie_word_embeddings": False, "num_hidden_layers": 1}
TIED: dict[str, object] = {"num_hidden_layers": 1}
FORMS: dict[str, dict[str, object]] = {
    "untied": UNTIED,
    "tied": TIED,
    "gpt_neox": {**GPT_NEOX, **UNTIED},
    "bloom": {**BLOOM, **TIED},
}
IDS = torch.arange(40)[None]


@pytest.fixture(autouse=True)
def short_held_out_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "HELD_OUT_TOKENS", 128)
    monkeypatch.setattr(texts, "HELD_OUT_SEQ_LEN", 64)
    monkeypatch.setattr("quant.report.plot.is_plot_possible", lambda: False)


def quantize(
    source: Path, out: Path, *, head: int | None, embeddings: int | None, **changes: object
) -> QuantizationReport:
    options = replace(OPTIONS, head_bits=head, embedding_bits=embeddings, **changes)  # type: ignore[arg-type]
    return quantize_with(TinyAccess(serves=False), source, out, options, SilentProgress())


@pytest.mark.parametrize(("head", "embeddings"), [(4, 8), (8, None), (None, 4)])
@pytest.mark.parametrize("form", FORMS)
def test_every_reader_sees_the_same_ends(tmp_path: Path, form: str, head: int | None, embeddings: int | None) -> None:
    is_tied = form in ("tied", "bloom")
    if is_tied and head and embeddings:
        head = embeddings
    source, out = write_source(tmp_path / "source", torch.float16, **FORMS[form]), tmp_path / "out"
    report = quantize(source, out, head=head, embeddings=embeddings)
    decoder, layers = load_decoder(out), DirectoryLayers(out)
    names = checkpoint_names(json.loads((source / "config.json").read_text()))

    found = decoder(IDS).detach()
    for name in (end.name for end in report.ends):
        checked = torch.from_numpy(stored_weight(out / "model.safetensors", names.stored(name).name))
        assert torch.equal(layers.table(name).rows(0, 128), checked)
        if name == EMBEDDINGS:
            assert torch.equal(decoder.model.embed_tokens.weight, checked)
    with torch.inference_mode():
        hidden = layers.embed(IDS)
        tables = layers.rotary(torch.arange(40))
        for index in range(layers.num_layers):
            hidden = layers.layer(index)(hidden, *tables)
        assert float((layers.logits(layers.final_norm(hidden)[0]) - found[0]).abs().max()) < 1e-4
    served = serving_logits(prepare(decoder, exact=True), IDS[0])
    assert float((served - found[0]).abs().max()) < 1e-4

    expected = {EMBEDDINGS} if is_tied else {name for name, bits in ((EMBEDDINGS, embeddings), (HEAD, head)) if bits}
    assert {end.name for end in report.ends} == expected
    assert (report.head_bits, report.embedding_bits) == ((head or embeddings,) * 2 if is_tied else (head, embeddings))
    settings = json.loads((out / "quantize_config.json").read_text())
    assert settings["lm_head"] is (head is not None and not is_tied)


def test_ends_in_version_2_are_read_as_such(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source", torch.float16, **UNTIED), tmp_path / "out"
    quantize(source, out, head=4, embeddings=8, checkpoint_format=CheckpointFormat.V2)
    layers = DirectoryLayers(out)
    for name in (EMBEDDINGS, HEAD):
        checked = torch.from_numpy(stored_weight(out / "model.safetensors", name, zero_offset=0))
        assert torch.equal(layers.table(name).rows(0, 128), checked)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_table_in_runs_gets_the_codes_that_it_gets_at_once(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(shape, generator=generator) for shape in ((128, 64), (512, 64)))
    inputs[:, :8] *= 4
    hessian = inputs.t() @ inputs / 512
    options = GptqOptions(bits=4, group_size=32, symmetric=symmetric)
    matrix, report = quantize_table("lm_head", HeldTable(weight), hessian, options, run_rows=48)
    whole = quantize_matrix(weight, hessian, options)
    assert torch.equal(matrix.codes, whole.matrix.codes)
    assert torch.equal(matrix.scales, whole.matrix.scales)
    assert report.error == pytest.approx(whole.error, rel=1e-4)
    rounded = round_table(HeldTable(weight), options, run_rows=48).rows(0, 128)
    assert torch.equal(rounded, round_to_nearest(weight, options).dequantize())


def test_gptq_beats_rounding_for_logits_and_for_the_values_of_embeddings() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, inputs = (torch.randn(shape, generator=generator) for shape in ((128, 64), (512, 64)))
    inputs @= torch.randn((64, 64), generator=generator)
    options = GptqOptions(bits=4, group_size=32)
    rounded = round_table(HeldTable(weight), options, run_rows=64).rows(0, 128)
    head, _ = quantize_table("lm_head", HeldTable(weight), inputs.t() @ inputs / 512, options, run_rows=64)
    values, report = quantize_table("model.embed_tokens", HeldTable(weight), None, options, run_rows=64)

    def error(table: torch.Tensor, of: torch.Tensor) -> float:
        return float((of @ (table - weight).t()).square().sum() / (of @ weight.t()).square().sum())

    assert error(head.dequantize(), inputs) < 0.8 * error(rounded, inputs)
    assert error(values.dequantize(), torch.eye(64)) < 0.99 * error(rounded, torch.eye(64))
    assert report.error == pytest.approx(error(values.dequantize(), torch.eye(64)), rel=1e-4)


def test_what_only_a_lookup_sees_of_a_tied_table_is_kept() -> None:
    weight = torch.randn((128, 64), generator=torch.Generator().manual_seed(3))
    inputs = torch.randn((512, 64), generator=torch.Generator().manual_seed(4))
    inputs[:, 5] = 0.0
    options = GptqOptions(bits=4, group_size=32)
    hessian = inputs.t() @ inputs / 512
    head, _ = quantize_table("lm_head", HeldTable(weight), hessian, options, run_rows=64)
    tied, _ = quantize_table("model.embed_tokens", HeldTable(weight), count_lookups(hessian), options, run_rows=64)
    assert not head.dequantize()[:, 5].any()
    assert float((tied.dequantize() - weight)[:, 5].norm() / weight[:, 5].norm()) < 0.15


def test_rows_of_a_packed_table_are_those_of_the_whole() -> None:
    weight = torch.randn((96, 64), generator=torch.Generator().manual_seed(2))
    matrix = round_to_nearest(weight, GptqOptions(bits=4, group_size=32))
    packed = open_packed("lm_head", pack_linear(matrix), parse_settings({"bits": 4, "group_size": 32}, "test"))
    table, ids = CodedTable(packed.matrix, packed.shape), torch.tensor([5, 0, 95, 17])
    assert table.shape == (96, 64)
    assert torch.equal(table.rows(7, 31), matrix.dequantize()[7:31])
    assert torch.equal(table.gather(ids), matrix.dequantize()[ids])


class StoppedError(BaseException):
    """Stands for SIGKILL: nothing may rely on being told."""


@pytest.mark.parametrize("form", ["untied", "tied"])
def test_a_run_that_stopped_before_its_head_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    source = write_source(tmp_path / "source", torch.float16, **FORMS[form])
    quantize(source, tmp_path / "whole", head=4, embeddings=4)
    real, last = layer_walk.quantize_table, HEAD if form == "untied" else EMBEDDINGS

    def stops(name: str, *arguments: object) -> object:
        if name == last:
            raise StoppedError
        return real(name, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(layer_walk, "quantize_table", stops)
        with pytest.raises(StoppedError):
            quantize(source, tmp_path / "out", head=4, embeddings=4)
    done: list[str] = []

    def counts(name: str, *arguments: object) -> object:
        done.append(name)
        return real(name, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(layer_walk, "quantize_table", counts)
    monkeypatch.setattr(layer_walk.CalibrationWalk, "quantize_layer", stops)
    quantize(source, tmp_path / "out", head=4, embeddings=4)
    assert done == [last]
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_what_follows_is_calibrated_on_quantised_embeddings(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", torch.float16, **UNTIED)
    quantize(source, tmp_path / "plain", head=None, embeddings=None)
    quantize(source, tmp_path / "out", head=None, embeddings=4)
    name = "model.layers.0.self_attn.q_proj.qweight"
    plain, found = (load_file(tmp_path / folder / "model.safetensors")[name] for folder in ("plain", "out"))
    assert not torch.equal(plain, found)


def test_perplexity_is_measured_with_the_quantised_ends_and_so_is_the_baseline(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", torch.float16, **UNTIED)
    plain = quantize(source, tmp_path / "plain", head=None, embeddings=None).texts[0]
    ends = quantize(source, tmp_path / "ends", head=4, embeddings=4).texts[0]
    assert ends.plain.mean_kl > 1.2 * plain.plain.mean_kl
    assert plain.round_to_nearest is not None
    assert ends.round_to_nearest is not None
    assert ends.round_to_nearest.mean_kl > 1.2 * plain.round_to_nearest.mean_kl


def test_a_perplexity_budget_leaves_the_ends_as_they_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "HELD_OUT_TOKENS", 512)
    source = write_source(tmp_path / "source")
    more: dict[str, object] = {"head": 8, "embeddings": 8, "samples": 8, "measures_prose": True}
    four = quantize(source, tmp_path / "four", **more)  # type: ignore[arg-type]
    limit = four.perplexity_increase_percent / 2
    report = quantize(source, tmp_path / "out", **more, max_perplexity_increase=limit)  # type: ignore[arg-type]
    assert report.perplexity_increase_percent <= limit < four.perplexity_increase_percent
    assert {linear.bits for layer in report.layers for linear in layer.linears} == {4, 8}
    tables = [DirectoryLayers(tmp_path / name).table(EMBEDDINGS).rows(0, 128) for name in ("out", "four")]
    assert torch.equal(*tables)


def test_report_names_the_ends_and_who_cannot_load_them(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source", torch.float16, **TIED), tmp_path / "out"
    report = quantize(source, out, head=8, embeddings=None)
    assert {loader.tool for loader in report.who_loads if loader.loads} == {"Causerie", "llama.cpp, Ollama"}
    text = (out / "quantization_report.md").read_text()
    assert "head and embeddings, one table, in 8 bits" in text
    assert "| model.embed_tokens | 8 | 32 |" in text
    manifest = json.loads((out / "causerie.json").read_text())
    assert (manifest["config"]["head_bits"], manifest["config"]["embedding_bits"]) == (8, 8)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_head_is_shared_only_where_it_is_the_same_to_the_bit(tmp_path: Path, is_tied: bool) -> None:
    source = DirectoryLayers(write_source(tmp_path / "source", tie_word_embeddings=is_tied))
    same = DirectoryLayers(write_source(tmp_path / "same", tie_word_embeddings=is_tied))
    hidden = torch.randn(3, source.hidden_size)
    shared = share_head(same, source)
    assert isinstance(shared, SharedHead)
    assert torch.equal(shared.logits(hidden), same.logits(hidden))

    file = tmp_path / "same" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{EMBEDDINGS if is_tied else HEAD}.weight"][-1, -1] += 0.01
    save_file(tensors, file)
    other = DirectoryLayers(tmp_path / "same")
    assert share_head(other, source) is other


def test_rows_of_the_embeddings_do_not_stay_after_a_lookup(tmp_path: Path) -> None:
    layers = DirectoryLayers(write_source(tmp_path / "source"))
    once, again = (layers.embed(torch.arange(64)) for _ in range(2))
    assert torch.equal(once, again)
    kept = [part.weight.numel() for part in vars(layers)["_ends"].modules() if isinstance(part, torch.nn.Embedding)]
    assert kept == [0]


def test_a_copy_of_a_tied_head_is_left_out(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", torch.float16, **TIED)
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, source / "model.safetensors")
    quantize(source, tmp_path / "out", head=8, embeddings=None)
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")


def test_one_table_cannot_have_two_widths(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", torch.float16, **TIED)
    with pytest.raises(QuantizationError, match=r"one table, which cannot have 8 bits and 4 bits .*same value"):
        quantize(source, tmp_path / "out", head=8, embeddings=4)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_vocabulary_that_does_not_fill_whole_words_is_refused(tmp_path: Path) -> None:
    source = DirectoryLayers(write_source(tmp_path / "source", torch.float16, vocab_size=132, **UNTIED))
    with pytest.raises(QuantizationError, match=r"lm_head has 132 rows, .* words of 8 codes"):
        choose_ends(source, replace(OPTIONS, head_bits=4))
    assert set(choose_ends(source, replace(OPTIONS, head_bits=8))) == {HEAD}


def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", torch.float16, **UNTIED)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"][3, 3] = torch.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(QuantizationError, match=r"lm_head.* not finite"):
        quantize(source, tmp_path / "out", head=4, embeddings=None)


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
@pytest.mark.parametrize("change", ["rows", "beside", "missing"])
def test_packed_ends_that_do_not_fit_are_refused_by_both_loaders(tmp_path: Path, name: str, change: str) -> None:
    source, out = write_source(tmp_path / "source", torch.float16, **UNTIED), tmp_path / "out"
    quantize(source, out, head=8, embeddings=8)
    tensors = load_file(out / "model.safetensors")
    if change == "rows":
        fewer = round_to_nearest(torch.randn((64, 64)), GptqOptions(bits=8, group_size=32))
        tensors.update({f"{name}.{part}": tensor for part, tensor in pack_linear(fewer).items()})
    elif change == "beside":
        tensors[f"{name}.weight"] = torch.zeros((128, 64), dtype=torch.float16)
    else:
        del tensors[f"{name}.scales"]
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name}.*(\(64, 64\)|scales is missing)|lacks: {name}\.weight"):
        load_decoder(out)
    with pytest.raises(CheckpointError, match=rf"{name}.*(\(64, 64\)|scales is missing)|{name}\.weight, which"):
        DirectoryLayers(out).table(name)


def test_the_plan_counts_the_ends_as_they_will_be(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", torch.float16, **UNTIED)
    machine = Machine(10**12, 10**12, 1, Rates(1e9, 1e9, 1e9, 1e-6))
    sizes = sizes_of(DirectoryLayers(source))
    options = replace(OPTIONS, gptq=GptqOptions(group_size=32), head_bits=8, embedding_bits=4)
    quantize(source, tmp_path / "out", head=8, embeddings=4)
    written = load_file(tmp_path / "out/model.safetensors").values()
    planned = {part.name: part.amount for part in make_plan(sizes, options, machine).disk}
    assert planned["result"] == pytest.approx(
        sum(tensor.numel() * tensor.element_size() for tensor in written), rel=0.02
    )
