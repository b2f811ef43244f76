"""The walk from and to disk: the same codes as in memory, going on after an interruption, full disks, bad values."""

from __future__ import annotations

import errno
import functools
import gc
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.errors import QuantizationError
from quant.formats import autogptq_writer, tensor_files
from quant.formats.checkpoint_format import CheckpointFormat
from quant.formats.checkpoint_names import CheckpointNames
from quant.int4_linear import QuantizedLinear
from quant.method.gptq import GptqOptions
from quant.options import LinearChoice, QuantizeOptions
from quant.progress import SilentProgress
from quant.run import quantize_directory, texts
from quant.run.calibration import Row
from quant.run.quantize_directory import quantize_with
from quant.walk import layer_files
from quant.walk.layer_files import open_work
from quant.walk.quantize_model import CalibrationWalk, quantize_layers
from serving.model.layer_source import DirectoryLayers
from serving.model.weights import load_decoder
from tests.quant.tiny_models import BLOOM, GPT_NEOX, PALM, TinyAccess, write_source

pytestmark = pytest.mark.unit

OPTIONS = QuantizeOptions(samples=8, seq_len=64)


@pytest.fixture(autouse=True)
def short_held_out_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "HELD_OUT_TOKENS", 128)
    monkeypatch.setattr(texts, "HELD_OUT_SEQ_LEN", 64)
    # The picture takes longer than the rest.
    monkeypatch.setattr("quant.report.plot.is_plot_possible", lambda: False)


def quantize(source: Path, out: Path, options: QuantizeOptions = OPTIONS) -> None:
    quantize_with(TinyAccess(serves=False), source, out, options, SilentProgress())


def works(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.partial-*"))


@pytest.mark.parametrize("form", [{}, PALM, BLOOM, GPT_NEOX], ids=["llama", "palm", "bloom", "gpt_neox"])
def test_from_disk_come_the_codes_that_the_model_in_memory_gets(tmp_path: Path, form: dict[str, object]) -> None:
    source = write_source(tmp_path / "source", torch.float16, **form)
    quantize(source, tmp_path / "out")
    decoder = load_decoder(source)
    encode = TinyAccess().encoder(source)
    assert encode(Row(text="a"))
    calibration = texts.prepare_texts(encode, OPTIONS, 512).calibration
    quantize_layers(decoder, calibration, GptqOptions(), SilentProgress())
    written = dict(load_decoder(tmp_path / "out").named_modules())
    for name, module in decoder.named_modules():
        if isinstance(module, QuantizedLinear):
            found = written[name]
            assert isinstance(found, QuantizedLinear)
            assert torch.equal(found.matrix.codes, module.matrix.codes), name


class StoppedError(BaseException):
    """Stands for SIGKILL: nothing may rely on being told."""


@pytest.mark.parametrize("version", list(CheckpointFormat))
def test_an_interrupted_run_goes_on_at_the_layer_it_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: CheckpointFormat
) -> None:
    source = write_source(tmp_path / "source", num_hidden_layers=3)
    # Asymmetric: a zero point that is read back one off changes every layer after it.
    options = replace(OPTIONS, checkpoint_format=version, gptq=GptqOptions(symmetric=False))
    quantize(source, tmp_path / "whole", options)
    quantized: list[int] = []
    real = CalibrationWalk.quantize_layer

    def stops_at_layer_two(walk: CalibrationWalk, index: int, layer: torch.nn.Module) -> object:
        if index == 2 and not quantized.count(2):
            quantized.append(2)
            raise StoppedError
        quantized.append(index)
        return real(walk, index, layer)

    monkeypatch.setattr(CalibrationWalk, "quantize_layer", stops_at_layer_two)
    with pytest.raises(StoppedError):
        quantize(source, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    quantize(source, tmp_path / "out", options)
    assert quantized == [0, 1, 2, 2]
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert works(tmp_path) == []


def test_a_layer_file_that_was_cut_short_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "source")
    quantize(source, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(quantize_directory, "write_checkpoint", stop)
        with pytest.raises(StoppedError):
            quantize(source, tmp_path / "out")
    (work,) = works(tmp_path)
    cut = work / "layer-00001.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    quantize(source, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def stop(*arguments: object, **named: object) -> None:
    raise StoppedError


@pytest.mark.parametrize("change", ["options", "format", "source", "text"])
def test_work_of_other_options_source_or_text_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    source = write_source(tmp_path / "source")
    with monkeypatch.context() as patch:
        patch.setattr(quantize_directory, "write_checkpoint", stop)
        with pytest.raises(StoppedError):
            quantize(source, tmp_path / "out")
    (old,) = works(tmp_path)
    options = OPTIONS
    if change == "options":
        options = QuantizeOptions(samples=8, seq_len=64, gptq=GptqOptions(damp=0.02))
    elif change == "format":
        options = replace(OPTIONS, checkpoint_format=CheckpointFormat.V2)
    elif change == "text":
        options = QuantizeOptions(samples=8, seq_len=64, seed=1)
    else:
        tensors = load_file(source / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
        save_file(tensors, source / "model.safetensors")
    quantize(source, tmp_path / "out", options)
    assert (tmp_path / "out/model.safetensors").is_file()
    assert works(tmp_path) == [old]


FAULTS = 8


@pytest.mark.parametrize("fault", range(FAULTS))
def test_a_full_disk_leaves_nothing_under_the_name_and_the_work_for_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    """The disk fills up at the `fault`-th file: two layers', the weights', and those beside them."""
    source = write_source(tmp_path / "source")
    files_begun = 0

    def fails_in_turn(path: Path) -> None:
        nonlocal files_begun
        files_begun += 1
        if files_begun == fault + 1:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        for module in (layer_files, autogptq_writer):
            patch.setattr(module, "write_tensors", failing(tensor_files.write_tensors, 0, fails_in_turn))
        patch.setattr(Path, "write_text", failing(Path.write_text, 0, fails_in_turn))
        patch.setattr(shutil, "copyfile", failing(shutil.copyfile, 1, fails_in_turn))
        with pytest.raises(QuantizationError, match=r"the disk of .* is full .*kept in .*again to go on") as raised:
            quantize(source, tmp_path / "out")
    done = min(fault, 2)
    assert f"{done} of 2 layers" in str(raised.value)
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in works(tmp_path)[0].glob("*.safetensors")) == [
        f"layer-0000{index}.safetensors" for index in range(done)
    ]
    quantize(source, tmp_path / "out")
    assert (tmp_path / "out/causerie.json").is_file()
    assert works(tmp_path) == []


def failing(real: Callable[..., object], position: int, fails: Callable[[Path], None]) -> Callable[..., object]:
    """`real`, with `fails` called first on its argument at `position`, the file to write."""

    def write(*arguments: object, **named: object) -> object:
        fails(Path(str(arguments[position])))
        return real(*arguments, **named)

    return write


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["mlp.up_proj.weight", "input_layernorm.weight"])
def test_weights_that_are_not_finite_stop_the_run_naming_layer_and_module(
    tmp_path: Path, tensor: str, value: float
) -> None:
    source = write_source(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[f"model.layers.1.{tensor}"].view(-1)[5] = value
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(QuantizationError, match=rf"model\.layers\.1\.{tensor} holds values that are not finite"):
        quantize(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("tensor", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_ends_that_are_not_finite_are_named_before_a_layer_is_quantised(
    tmp_path: Path, tensor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_walk(*_: object) -> None:
        raise AssertionError("a layer was quantised")

    monkeypatch.setattr(quantize_directory, "quantize_to_disk", no_walk)
    source = write_source(tmp_path / "source", tie_word_embeddings=False)
    tensors = load_file(source / "model.safetensors")
    tensors[tensor].view(-1)[-1] = float("nan")  # of the last row, which no text here uses
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(QuantizationError, match=rf"^{tensor} holds values that are not finite"):
        quantize(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_other_safetensors_beside_the_model_are_left_alone(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    save_file({"layers.0.attention.wq.weight": torch.zeros(64, 64)}, source / "consolidated.safetensors")
    quantize(source, tmp_path / "out")
    assert not any(name.startswith("layers.") for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_activations_that_are_not_finite_stop_the_run_naming_what_they_go_into(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", torch.float32)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"].mul_(1e30)
    tensors["model.layers.1.mlp.up_proj.weight"].mul_(1e30)
    save_file(tensors, source / "model.safetensors")
    options = QuantizeOptions(samples=8, seq_len=64, gptq=GptqOptions(range_search=False))
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp"):
        quantize(source, tmp_path / "out", options)


def test_choices_of_single_linears_are_followed_and_written_down(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    fine = "model.layers.1.mlp.up_proj"
    options = QuantizeOptions(samples=8, seq_len=64, choices={fine: LinearChoice(8, 16)})
    quantize(source, tmp_path / "out", options)
    dynamic = json.loads((tmp_path / "out/quantize_config.json").read_text())["dynamic"]
    assert list(dynamic.values()) == [{"bits": 8, "group_size": 16}]
    matrices = {
        name: module.matrix
        for name, module in load_decoder(tmp_path / "out").named_modules()
        if isinstance(module, QuantizedLinear)
    }
    grids = {name: (matrix.bits, matrix.group_size) for name, matrix in matrices.items()}
    assert grids.pop(fine) == (8, 16)
    assert set(grids.values()) == {(4, 32)}


def test_a_large_result_is_written_in_shards_that_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "source")
    quantize(source, tmp_path / "one")
    in_shards = functools.partial(autogptq_writer.write_checkpoint, shard_bytes=20_000)
    monkeypatch.setattr(quantize_directory, "write_checkpoint", in_shards)
    quantize(source, tmp_path / "many")
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert not (tmp_path / "many/model.safetensors").exists()
    ids = torch.arange(20)[None]
    assert torch.equal(load_decoder(tmp_path / "many")(ids), load_decoder(tmp_path / "one")(ids))
    assert DirectoryLayers(tmp_path / "many").num_layers == 2


def test_one_layer_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "source", num_hidden_layers=3)
    references: list[Callable[[], object | None]] = []
    real = DirectoryLayers.layer

    def watched(layers: DirectoryLayers, index: int) -> torch.nn.Module:
        gc.collect()
        assert not any(reference() is not None for reference in references), index
        layer = real(layers, index)
        references.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(DirectoryLayers, "layer", watched)
    quantize(source, tmp_path / "out")
    assert len(references) >= 9


def test_two_runs_for_one_result_at_once_are_refused(tmp_path: Path) -> None:
    names = CheckpointNames()
    with open_work(tmp_path / "out", "a" * 64, names, CheckpointFormat.V1):
        with (
            pytest.raises(QuantizationError, match="another process is making"),
            open_work(tmp_path / "out", "a" * 64, names, CheckpointFormat.V1),
        ):
            pytest.fail("both got in")
        with open_work(tmp_path / "out", "b" * 64, names, CheckpointFormat.V1):
            assert len(works(tmp_path)) == 2
    assert works(tmp_path) == []
