"""Serving logits with one layer in memory at a time against those of the whole model, bit for bit."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quant.options import LinearChoice, QuantizeOptions
from quant.progress import SilentProgress
from quant.run import texts
from quant.run.quantize_directory import quantize_with
from serving.engine.layered_logits import serve_windows
from serving.engine.logits import serving_logits
from serving.engine.prepare import PreparedModel, prepare
from serving.model.layer_source import DirectoryLayers
from serving.model.weights import load_decoder
from tests.quant.tiny_models import BLOOM, GPT_NEOX, PALM, TinyAccess, tiny_ids, write_source

pytestmark = pytest.mark.unit

# Two heads of 32: a form that the native step computes.
NATIVE: dict[str, object] = {"num_attention_heads": 2, "num_key_value_heads": 1}
FORMS = {
    "native": NATIVE,
    "native, untied": {**NATIVE, "tie_word_embeddings": False},
    "heads of 16": {},
    "palm": PALM,
    "bloom": BLOOM,
    "gpt_neox": GPT_NEOX,
}
OPTIONS = QuantizeOptions(samples=4, seq_len=64, measures_prose=False, measures_speed=False)
# Longer than a chunk of the engine's, so that the second one reads what the first has cached.
WINDOWS = tiny_ids(3, 300)


@pytest.fixture(autouse=True)
def short_held_out_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "HELD_OUT_TOKENS", 64)
    monkeypatch.setattr(texts, "HELD_OUT_SEQ_LEN", 64)
    monkeypatch.setattr("quant.report.plot.is_plot_possible", lambda: False)


def quantized(folder: Path, form: dict[str, object], options: QuantizeOptions = OPTIONS) -> Path:
    source = write_source(folder / "source", torch.float16, **form)
    quantize_with(TinyAccess(serves=False), source, folder / "out", options, SilentProgress())
    return folder / "out"


def whole(directory: Path) -> PreparedModel:
    return prepare(load_decoder(directory, dtype=torch.bfloat16), exact=False)


def in_layers(directory: Path) -> list[Tensor]:
    logits = serve_windows(directory, WINDOWS, SilentProgress(), "measure")
    return [logits(window, slice(None)) for window in range(len(WINDOWS))]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_logits_of_a_quantised_model_equal_the_whole_models(tmp_path: Path, form: dict[str, object]) -> None:
    directory = quantized(tmp_path, form)
    model = whole(directory)
    for ids, found in zip(WINDOWS, in_layers(directory), strict=True):
        assert torch.equal(found, serving_logits(model, ids))


def test_logits_of_plain_weights_equal_the_whole_models(tmp_path: Path) -> None:
    directory = write_source(tmp_path / "source", torch.bfloat16, **NATIVE)
    model = whole(directory)
    assert model.native is None
    assert torch.equal(in_layers(directory)[1], serving_logits(model, WINDOWS[1]))


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_quantised_ends_equal_the_whole_models(tmp_path: Path, *, tied: bool) -> None:
    form = {**NATIVE, "tie_word_embeddings": tied}
    directory = quantized(tmp_path, form, replace(OPTIONS, head_bits=8, embedding_bits=8))
    assert torch.equal(in_layers(directory)[0], serving_logits(whole(directory), WINDOWS[0]))


def test_one_layer_that_the_native_step_does_not_take_keeps_it_from_all(tmp_path: Path) -> None:
    """A gate in 8 bits beside 4-bit inputs: the two are multiplied as one plain matrix, in this layer only."""
    choices = {"model.layers.1.mlp.gate_proj": LinearChoice(8, 32)}
    directory = quantized(tmp_path, NATIVE, replace(OPTIONS, choices=choices))
    model = whole(directory)
    assert model.native is None
    assert torch.equal(in_layers(directory)[2], serving_logits(model, WINDOWS[2]))


def test_rows_of_a_window_are_those_of_the_whole_window(tmp_path: Path) -> None:
    logits = serve_windows(quantized(tmp_path, NATIVE), WINDOWS, SilentProgress(), "measure")
    assert torch.equal(logits(1, slice(256, 512)), logits(1, slice(None))[256:])


def test_no_layer_is_in_memory_beside_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = quantized(tmp_path, NATIVE)
    read, layer_of = list[weakref.ref[nn.Module]](), DirectoryLayers.layer

    def remembered(layers: DirectoryLayers, index: int) -> nn.Module:
        assert all(earlier() is None for earlier in read)
        layer = layer_of(layers, index)
        read.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(DirectoryLayers, "layer", remembered)
    serve_windows(directory, WINDOWS, SilentProgress(), "measure")
    assert len(read) == 2
