"""PaLM, BLOOM and GPT-NeoX from a plain directory to a quantised one that serves, and that other tools understand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
)

from quant.errors import QuantizationError
from quant.formats.autogptq import read_json
from quant.formats.autogptq_check import stored_weight
from quant.method.gptq import GptqOptions
from quant.progress import SilentProgress
from quant.run import texts
from quant.run.quantize_directory import QuantizeOptions, quantize_with
from serving.engine.logits import serving_logits
from serving.engine.prepare import prepare
from serving.model.weights import load_decoder
from tests.quant.tiny_models import PALM, TinyAccess, write_source

pytestmark = pytest.mark.unit

# Random weights lose much at 4 bits.
OPTIONS = QuantizeOptions(gptq=GptqOptions(bits=8), samples=8, seq_len=64)
BLOOM: Mapping[str, object] = {
    "architectures": ["BloomForCausalLM"],
    "model_type": "bloom",
    "n_layer": 2,
    "n_head": 4,
    "layer_norm_epsilon": 1e-5,
    "seq_length": 1024,
}
NEOX: Mapping[str, object] = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "rotary_pct": 0.25,
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
}
FAMILIES: Mapping[str, Mapping[str, object]] = {
    "palm": PALM,
    "bloom": BLOOM,
    "gpt_neox": NEOX,
    "gpt_neox_sequential": {**NEOX, "use_parallel_residual": False},
}
REFERENCES: Mapping[str, Callable[[dict[str, object]], PreTrainedModel]] = {
    "bloom": lambda values: BloomForCausalLM(BloomConfig.from_dict(values)),
    "gpt_neox": lambda values: GPTNeoXForCausalLM(GPTNeoXConfig.from_dict(values)),
    "cohere": lambda values: CohereForCausalLM(CohereConfig.from_dict(values)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def directories(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of the source and of the result."""
    name = str(request.param)
    return quantize(name, tmp_path_factory.mktemp(name))


def quantize(name: str, folder: Path, options: QuantizeOptions = OPTIONS) -> tuple[Path, Path]:
    source, out = write_source(folder / "source", torch.float32, **FAMILIES[name]), folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "HELD_OUT_TOKENS", 512)
        patch.setattr(texts, "HELD_OUT_SEQ_LEN", 64)
        quantize_with(TinyAccess(), source, out, options, SilentProgress())
    return source, out


def some_ids() -> Tensor:
    return torch.tensor([ord(letter) for letter in "What can you tell me about the history of paper?"])


def logits_of_transformers(directory: Path) -> Tensor:
    """Of a quantised directory: its words unpacked by independent code, put into transformers' own model."""
    path = directory / "model.safetensors"
    stored = load_file(path)
    linears = [key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")]
    state = {key: tensor.float() for key, tensor in stored.items() if key.rpartition(".")[2] in ("weight", "bias")}
    state.update({f"{linear}.weight": torch.from_numpy(stored_weight(path, linear)) for linear in linears})
    config = {key: value for key, value in read_json(directory / "config.json").items() if "quantization" not in key}
    # In memory transformers calls this head otherwise than in files.
    state = {key.replace("embed_out", "lm_head"): tensor for key, tensor in state.items()}
    model = REFERENCES[str(config["model_type"])]({**config, "dtype": "float32", "torch_dtype": "float32"}).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    with torch.no_grad():
        return model(some_ids()[None]).logits[0]


def test_result_predicts_almost_what_its_source_does(directories: tuple[Path, Path]) -> None:
    source, out = directories
    ids = some_ids()[None]
    with torch.inference_mode():
        before, after = load_decoder(source)(ids), load_decoder(out)(ids)
    assert float((after - before).norm() / before.norm()) < 0.03


def test_result_is_served_and_understood_elsewhere_alike(directories: tuple[Path, Path]) -> None:
    _, out = directories
    expected = logits_of_transformers(out)
    for chunk_tokens in (256, 1):
        found = serving_logits(prepare(load_decoder(out), exact=True), some_ids(), chunk_tokens=chunk_tokens)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def no_walk(*_: object) -> None:
    raise AssertionError("a layer was quantised")


@pytest.mark.parametrize(
    ("name", "eight_bit", "complaint"),
    [
        (
            "bloom",
            ("v_proj",),
            r"q_proj, k_proj, v_proj as one linear .* would be q_proj 4, k_proj 4, v_proj 8",
        ),
        ("gpt_neox", ("q_proj", "k_proj"), r"gpt_neox\.layers\.0\.attention\.query_key_value"),
        ("bloom", ("gate_proj",), r"gate_proj: this model has no such linear; it has down_proj, k_proj, o_proj"),
    ],
)
def test_bits_that_the_family_cannot_store_are_refused_before_a_layer_is_quantised(
    name: str, eight_bit: tuple[str, ...], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant.run.quantize_directory.quantize_to_disk", no_walk)
    with pytest.raises(QuantizationError, match=complaint):
        quantize(name, tmp_path, replace(OPTIONS, gptq=GptqOptions(bits=4), eight_bit=eight_bit))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
