from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant.method.gptq import GptqOptions, round_to_nearest
from quant.model_directory import DataFile
from quant.options import LinearChoice, QuantizeOptions
from quant.progress import SilentProgress
from quant.report.measure import (
    COMPARED_ROWS,
    AgreementSum,
    PlainPaths,
    carry_paths,
    compare,
    log_softmax_in_place,
    mean_log_loss,
)
from quant.run.compare_texts import compare_texts
from quant.run.quantize_directory import quantize_with
from quant.run.texts import HeldOut
from serving.model.layer_source import DirectoryLayers
from serving.model.weights import load_decoder
from tests.quant.tiny_models import BLOOM, GPT_NEOX, PALM, TinyAccess, tiny_decoder, tiny_ids, write_source

pytestmark = pytest.mark.unit


FORMS = pytest.mark.parametrize(
    "form",
    [{}, PALM, {"tie_word_embeddings": False}, BLOOM, GPT_NEOX],
    ids=["llama", "palm", "untied", "bloom", "gpt_neox"],
)
GRID = GptqOptions(group_size=32)


def carry(source: Path, result: Path, windows: Tensor, bits: int = 4) -> PlainPaths:
    layers = DirectoryLayers(source)
    choices = {
        f"model.layers.{index}.{name}": LinearChoice(bits, 32)
        for index in range(layers.num_layers)
        for name, module in layers.outline().named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    return carry_paths(layers, DirectoryLayers(result), choices, GRID, windows, SilentProgress(), "measure")


@FORMS
def test_plain_path_is_the_models_own_forward_in_float32_whatever_is_stored(
    tmp_path: Path, form: dict[str, object]
) -> None:
    source = write_source(tmp_path / "source", torch.float16, **form)
    windows = tiny_ids(5, 16)
    paths = carry(source, source, windows)
    expected = load_decoder(source)(windows)
    for window in range(5):
        assert torch.allclose(paths.source.logits(window), expected[window], atol=1e-5)
        assert torch.allclose(paths.result.logits(window), expected[window], atol=1e-5)


def test_quantised_model_is_measured_with_the_weights_of_its_file(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    quantize_with(TinyAccess(), source, tmp_path / "out", QuantizeOptions(samples=8, seq_len=64), SilentProgress())
    windows = tiny_ids(2, 16)
    paths = carry(source, tmp_path / "out", windows)
    expected = load_decoder(tmp_path / "out")(windows)
    assert torch.allclose(paths.result.logits(1), expected[1], atol=1e-5)
    assert not torch.allclose(paths.source.logits(1), expected[1], atol=1e-3)


def test_the_baseline_is_the_source_rounded_to_the_nearest_code_of_the_same_grids(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    windows = tiny_ids(2, 16)
    paths = carry(source, source, windows)
    decoder = load_decoder(source)
    with torch.no_grad():
        for module in decoder.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(round_to_nearest(module.weight, GRID).dequantize())
    assert torch.allclose(paths.nearest.logits(1), decoder(windows)[1], atol=1e-5)


def test_perplexity_is_that_of_predicting_each_next_token() -> None:
    windows = torch.tensor([[0, 1, 1]])
    # The first two positions give token 1 the probabilities 1/2 and 1/8; the last one predicts nothing in the window.
    probabilities = torch.tensor([[0.5, 0.5], [0.875, 0.125], [0.999, 0.001]])
    perplexity, _ = compare(windows, lambda _, rows: probabilities[rows].log(), [], SilentProgress(), "compare")
    assert perplexity == pytest.approx(4.0)


def test_agreement_worked_out_by_hand() -> None:
    source = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    other = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
    total = AgreementSum()
    total.add(torch.tensor([1]), source.log(), other.log())
    agreement = total.result()
    assert agreement.perplexity == pytest.approx(4.0)
    assert agreement.top1_agreement == 0.5
    first = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    second = 0.25 * math.log(0.25 / 0.75) + 0.75 * math.log(0.75 / 0.25)
    assert agreement.mean_kl == pytest.approx((first + second) / 2)
    assert agreement.kl_p99 == pytest.approx(max(first, second))


def test_the_99th_percentile_leaves_out_one_token_of_a_hundred() -> None:
    source = torch.full((100, 2), 0.5).log()
    other = torch.tensor([[0.5, 0.5]] * 98 + [[0.7, 0.3], [0.999, 0.001]]).log()
    total = AgreementSum()
    total.add(torch.zeros(99, dtype=torch.int64), source, other)
    assert total.result().kl_p99 == pytest.approx(0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3), rel=1e-4)


def test_a_model_agrees_wholly_with_itself() -> None:
    decoder, windows = tiny_decoder(), tiny_ids(2, 16)

    def logits(window: int, rows: slice) -> Tensor:
        return decoder(windows[window][None])[0, rows].detach()

    perplexity, (agreement,) = compare(windows, logits, [logits], SilentProgress(), "compare")
    assert agreement.perplexity == pytest.approx(perplexity)
    assert agreement.top1_agreement == 1.0
    assert agreement.mean_kl == pytest.approx(0.0, abs=1e-6)


def test_log_softmax_in_place_equals_torchs() -> None:
    logits = torch.randn((4, 50), generator=torch.Generator().manual_seed(0)) * 30
    expected = torch.log_softmax(logits, dim=-1)
    assert torch.allclose(log_softmax_in_place(logits), expected, atol=1e-5)


@pytest.mark.parametrize("tokens", [2, 127, 128, 129, 300])
def test_mean_log_loss_is_torchs_cross_entropy_from_few_rows_of_logits_at_a_time(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((2, tokens, 50), generator=generator) * 5
    windows = torch.randint(50, (2, tokens), generator=generator)
    asked: list[int] = []

    def rows_of(window: int, rows: slice) -> Tensor:
        asked.append(logits[window, rows].shape[0])
        return logits[window, rows].clone()

    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert mean_log_loss(rows_of, windows) == pytest.approx(float(expected), rel=1e-5)
    assert sum(asked) == 2 * tokens
    assert max(asked) <= COMPARED_ROWS


def test_each_text_is_compared_on_windows_of_its_own(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    parts = (tiny_ids(2, 16), tiny_ids(3, 16, seed=1))
    paths = carry(source, source, torch.cat(parts))
    texts = [HeldOut(DataFile(name, "", 1), windows) for name, windows in zip("ab", parts, strict=True)]
    seen: list[int] = []

    def served(window: int, rows: slice) -> Tensor:
        seen.append(window)
        return paths.source.logits(window, rows)

    found = compare_texts(texts, paths, served, SilentProgress())
    assert seen == [0, 1, 2, 3, 4]
    decoder = load_decoder(source)
    for text, windows in zip(found, parts, strict=True):
        logits = decoder(windows).detach()
        expected, _ = compare(
            windows, lambda at, rows, of=logits: of[at, rows].clone(), [], SilentProgress(), "compare"
        )
        assert text.source_perplexity == pytest.approx(expected, rel=1e-5)
        assert text.served is not None
        assert text.served.top1_agreement == 1.0
