"""From a model directory to a published 4-bit one, with a tiny decoder behind the `ModelAccess` seam."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.errors import CheckpointError, QuantizationError
from quant.formats.autogptq import gptq_settings, pack_linear
from quant.formats.checkpoint_format import CheckpointFormat
from quant.method.gptq import ActOrder, GptqOptions
from quant.method.matrix import QuantizedMatrix
from quant.method.packing import unpack_columns
from quant.model_directory import read_manifest
from quant.progress import SilentProgress
from quant.report.quantization_report import QuantizationReport
from quant.run import texts
from quant.run.quantize_directory import QuantizeOptions, quantize_with
from quant.walk import layer_files
from serving.model.weights import load_decoder
from tests.quant.tiny_models import CONFIG, PALM, TinyAccess, tiny_ids, write_source

pytestmark = pytest.mark.unit

OPTIONS = QuantizeOptions(samples=8, seq_len=64)


@pytest.fixture(autouse=True)
def short_held_out_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "HELD_OUT_TOKENS", 512)
    monkeypatch.setattr(texts, "HELD_OUT_SEQ_LEN", 64)


def quantize(source: Path, out: Path, options: QuantizeOptions = OPTIONS, *, serves: bool = True) -> QuantizationReport:
    return quantize_with(TinyAccess(serves=serves), source, out, options, SilentProgress())


def test_result_loads_and_predicts_almost_what_its_source_does(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    # Random weights lose much at 4 bits.
    report = quantize(source, out, replace(OPTIONS, gptq=GptqOptions(bits=8)))
    ids = torch.tensor([[ord(letter) for letter in "What can you tell me about the history of paper?"]])
    with torch.inference_mode():
        before, after = load_decoder(source)(ids), load_decoder(out)(ids)
    assert float((after - before).norm() / before.norm()) < 0.03
    assert report.group_size == 32


def test_directory_has_what_serves_it_and_what_others_need_to_load_it(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    quantize(source, out)
    config = json.loads((out / "config.json").read_text())
    section = config.pop("quantization_config")
    assert config == CONFIG
    assert section == json.loads((out / "quantize_config.json").read_text())
    assert {key: section[key] for key in ("quant_method", "checkpoint_format", "bits", "group_size", "sym")} == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
    }
    assert section["desc_act"] is False
    tensors = load_file(out / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.float16
    assert "model.layers.0.mlp.up_proj.weight" not in tensors
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


def test_float32_embeddings_and_norms_are_written_in_half_the_bytes_and_measured_so(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source", torch.float32, **PALM), tmp_path / "out"
    quantize(source, out)
    written, before = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(written[name], before[name].to(torch.float16))
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"


def test_values_that_half_the_bytes_cannot_hold_are_refused_by_name(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", torch.float32)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has values that float16 cannot hold"):
        quantize(source, tmp_path / "out")


def test_held_out_windows_are_not_longer_than_the_models_context(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", max_position_embeddings=48)
    report = quantize(source, tmp_path / "out", replace(OPTIONS, seq_len=48))
    assert report.texts[0].tokens == 512 // 48 * 48


def test_report_and_manifest_say_what_was_done_and_what_it_cost(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    quantize(source, out)
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["held_out_tokens"] == 512
    assert (report["calibration_windows"], report["calibration_tokens"]) == (8, 512)
    for path in ("plain", "served"):
        assert report[path]["perplexity"] > 1
        assert 0.5 < report[path]["top1_agreement"] <= 1
        assert 0 < report[path]["mean_kl"] < 0.1
    assert len(report["layers"]) == 2
    assert report["quantized_bytes"] < report["source_bytes"]
    assert report["peak_memory_bytes"] > 1e6
    text = (out / "quantization_report.md").read_text()
    assert "| as served |" in text
    assert "| layer | q_proj | k_proj | v_proj | o_proj | gate_proj | up_proj | down_proj |" in text
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.stage == "quantize"
    assert [parent.name for parent in manifest.parents] == ["source"]
    assert [data.name for data in manifest.data] == ["calibration.jsonl", "held_out.jsonl", "held_out_prose.jsonl"]
    assert manifest.chat_format_sha256 == "f" * 64
    assert str(tmp_path) not in (out / "causerie.json").read_text() + text


def test_without_a_serving_path_the_plain_one_is_reported(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    assert quantize(source, out, serves=False).texts[0].served is None
    assert "as served" not in (out / "quantization_report.md").read_text()


@pytest.mark.parametrize("symmetric", [True, False])
def test_asymmetric_and_act_order_results_read_back_exactly(tmp_path: Path, symmetric: bool) -> None:
    gptq = GptqOptions(symmetric=symmetric, act_order=ActOrder.STATIC, bits=8)
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    quantize(source, out, QuantizeOptions(gptq=gptq, samples=8, seq_len=64))
    assert json.loads((out / "config.json").read_text())["quantization_config"]["desc_act"] is False


@pytest.mark.parametrize("symmetric", [True, False])
def test_version_2_is_the_same_model_with_its_zero_points_as_they_are(tmp_path: Path, symmetric: bool) -> None:
    source = write_source(tmp_path / "source")
    options = replace(OPTIONS, gptq=GptqOptions(symmetric=symmetric))
    quantize(source, tmp_path / "1", options)
    quantize(source, tmp_path / "2", replace(options, checkpoint_format=CheckpointFormat.V2))
    one, two = (load_file(tmp_path / version / "model.safetensors") for version in "12")
    zeros = {name: (one.pop(name), two.pop(name)) for name in sorted(one) if name.endswith(".qzeros")}
    for first, second in zeros.values():
        assert torch.equal(unpack_columns(first, 4) + 1, unpack_columns(second, 4))
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
    ids = tiny_ids(1, 16)
    with torch.inference_mode():
        assert torch.equal(load_decoder(tmp_path / "1")(ids), load_decoder(tmp_path / "2")(ids))
    settings = gptq_settings(tmp_path / "2")
    assert settings is not None
    assert settings.checkpoint_format is CheckpointFormat.V2
    assert "AutoGPTQ's version 2" in (tmp_path / "2/quantization_report.md").read_text()


def test_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    for name in ("one", "two"):
        quantize(source, tmp_path / name)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_a_result_worse_than_allowed_is_not_published(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    options = QuantizeOptions(samples=8, seq_len=64, max_perplexity_increase=-50.0)
    with pytest.raises(QuantizationError, match=r"cannot be kept within -50 %: the best .*Try"):
        quantize(source, out, options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def wrong_zero(matrix: QuantizedMatrix, version: CheckpointFormat) -> dict[str, torch.Tensor]:
    tensors = pack_linear(matrix, version)
    return {**tensors, "qzeros": tensors["qzeros"] + 1}


def wrong_order(matrix: QuantizedMatrix, version: CheckpointFormat) -> dict[str, torch.Tensor]:
    tensors = pack_linear(matrix, version)
    return {**tensors, "qweight": tensors["qweight"].flip(0)}


def wrong_version(matrix: QuantizedMatrix, version: CheckpointFormat) -> dict[str, torch.Tensor]:
    return pack_linear(matrix, CheckpointFormat.V2 if version is CheckpointFormat.V1 else CheckpointFormat.V1)


@pytest.mark.parametrize("version", list(CheckpointFormat))
@pytest.mark.parametrize("writer", [wrong_zero, wrong_order, wrong_version])
def test_a_writer_that_writes_something_else_is_caught_before_publishing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: object, version: CheckpointFormat
) -> None:
    monkeypatch.setattr(layer_files, "pack_linear", writer)
    source = write_source(tmp_path / "source")
    with pytest.raises(CheckpointError, match="does not read back"):
        quantize(source, tmp_path / "out", replace(OPTIONS, checkpoint_format=version))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_directory_that_holds_something_is_not_overwritten(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(QuantizationError, match="exists and is not empty"):
        quantize(source, out)
    assert [path.name for path in out.iterdir()] == ["precious"]


class TakesTheName(SilentProgress):
    """Makes the result's directory while it is being measured, as another run would."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def update(self, stage: str, done: float, total: float) -> None:
        if stage.startswith("Measuring") and not self._out.exists():
            self._out.mkdir()
            (self._out / "model.safetensors").write_text("another run's")


def test_what_another_run_made_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    with pytest.raises(QuantizationError, match="exists and is not empty"):
        quantize_with(TinyAccess(), source, out, OPTIONS, TakesTheName(out))
    assert (out / "model.safetensors").read_text() == "another run's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_quantised_source_is_refused(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    quantize(source, out)
    assert gptq_settings(out) is not None
    with pytest.raises(QuantizationError, match="quantised already"):
        quantize(out, tmp_path / "again")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        quantize(tmp_path, tmp_path / "out")


def test_own_calibration_text_is_used_and_recorded(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    text = tmp_path / "mine.txt"
    text.write_text("some words of mine " * 40, encoding="utf-8")
    quantize(source, out, QuantizeOptions(samples=8, seq_len=64, calibration=text))
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.data[0].name == "mine.txt"
    with pytest.raises(QuantizationError, match="has 760 tokens; 128 samples of 64 need at least"):
        quantize(source, tmp_path / "other", QuantizeOptions(samples=128, seq_len=64, calibration=text))


def test_named_linears_get_eight_bits_and_say_so(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    names = ("q_proj", "k_proj", "v_proj")
    report = quantize(source, out, replace(OPTIONS, eight_bit=names))
    bits = {linear.name.rpartition(".")[2]: linear.bits for layer in report.layers for linear in layer.linears}
    assert {name for name, found in bits.items() if found == 8} == set(names)
    dynamic = json.loads((out / "quantize_config.json").read_text())["dynamic"]
    assert all(override == {"bits": 8} for override in dynamic.values())
    assert "(8 for q_proj, k_proj, v_proj)" in (out / "quantization_report.md").read_text()
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.config["eight_bit"] == list(names)
    matrices = {name: module for name, module in load_decoder(out).named_modules() if hasattr(module, "matrix")}
    assert matrices["model.layers.0.self_attn.v_proj"].matrix.bits == 8  # type: ignore[union-attr]
    assert matrices["model.layers.0.mlp.down_proj"].matrix.bits == 4  # type: ignore[union-attr]
