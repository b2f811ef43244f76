"""Models to train: log-probabilities without all logits, adapters that merge exactly, directories that load again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant.errors import CheckpointError
from serving.model.weights import load_decoder
from tests.training.tiny_directory import CPU, FULL, write_tiny_directory
from tests.training.tiny_llama import VOCAB_SIZE, random_samples, tiny_llama
from training import trunk as trunk_module
from training.batches import pad_rows
from training.distributed import full_tensors
from training.errors import TrainingError
from training.packed import batch_logprobs
from training.settings import AdapterSettings
from training.trunk import Trunk, choose_compute, load_trunk, logits_of, target_logprobs, write_weights

pytestmark = pytest.mark.unit

LORA = AdapterSettings(method="lora", lora_rank=2, lora_alpha=4)


def head_case(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(7, 16, generator=generator), torch.randint(0, VOCAB_SIZE, (7,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("max_logits", [2**24, 3 * VOCAB_SIZE])
def test_target_logprobs_are_those_of_all_logits(
    monkeypatch: pytest.MonkeyPatch, temperature: float, is_frozen: bool, max_logits: int
) -> None:
    monkeypatch.setattr(trunk_module, "_MAX_LOGITS", max_logits)
    model = tiny_llama()
    model.requires_grad_(not is_frozen)
    hidden, ids = head_case()
    weights = torch.linspace(-1, 2, 7)
    results: list[list[Tensor]] = []
    for is_ours in (True, False):
        model.zero_grad()
        leaf = hidden.clone().requires_grad_()
        if is_ours:
            logprobs, log_z = target_logprobs(model, leaf, ids, temperature=temperature)
        else:
            logits = logits_of(model, leaf) / temperature
            logprobs, log_z = logits.log_softmax(-1)[torch.arange(7), ids], logits.logsumexp(-1)
        (logprobs @ weights + (log_z**2).sum()).backward()
        assert leaf.grad is not None
        head = model.get_parameter("model.embed_tokens.weight")
        results.append(
            [logprobs.detach(), log_z.detach(), leaf.grad, *([] if head.grad is None else [head.grad.clone()])]
        )
    assert len(results[0]) == len(results[1]) == (3 if is_frozen else 4)
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_the_logit_scale_is_applied(tmp_path: Path) -> None:
    directory = write_tiny_directory(tmp_path / "model")
    trunk = load_trunk(directory, CPU, FULL)
    batch = pad_rows(random_samples(2))
    expected = trunk.model(input_ids=batch.input_ids).logits.log_softmax(-1)
    picked = expected[:, :-1].gather(-1, batch.input_ids[:, 1:, None])[..., 0][batch.is_target[:, 1:]]
    found, _ = batch_logprobs(trunk.model, CPU, batch)
    torch.testing.assert_close(found, picked, rtol=1e-4, atol=1e-5)


def disturb_adapters(trunk: Trunk) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in trunk.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=generator)


@pytest.mark.parametrize("adapters", [FULL, LORA], ids=["full", "lora"])
def test_written_weights_answer_as_the_trained_model(tmp_path: Path, adapters: AdapterSettings) -> None:
    source = write_tiny_directory(tmp_path / "source")
    trunk = load_trunk(source, CPU, adapters)
    disturb_adapters(trunk)
    write_weights(trunk, tmp_path / "out", adapters, full_tensors(trunk.model))
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        expected = trunk.model(input_ids=ids).logits
    served = load_decoder(tmp_path / "out")
    with torch.no_grad():
        found = served(ids)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_adapter_is_kept_in_pefts_format_without_a_path(tmp_path: Path) -> None:
    trunk = load_trunk(write_tiny_directory(tmp_path / "source"), CPU, LORA)
    write_weights(trunk, tmp_path / "out", LORA, full_tensors(trunk.model))
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "source"
    assert sorted(path.name for path in (tmp_path / "out" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_only_adapters_learn_with_lora(tmp_path: Path) -> None:
    trunk = load_trunk(write_tiny_directory(tmp_path / "source"), CPU, LORA)
    learning = [name for name, parameter in trunk.model.named_parameters() if parameter.requires_grad]
    assert learning
    assert all("lora_" in name for name in learning)


def test_qlora_learns_on_a_trunk_in_four_bits(tmp_path: Path) -> None:
    adapters = AdapterSettings(method="qlora", lora_rank=2, lora_alpha=4)
    source = write_tiny_directory(tmp_path / "source")
    trunk = load_trunk(source, CPU, adapters)
    linear = trunk.model.get_submodule("base_model.model.model.layers.0.mlp.gate_proj.base_layer")
    assert type(linear).__name__ == "Linear4bit"
    logprobs, _ = batch_logprobs(trunk.model, CPU, pad_rows(random_samples(2)))
    (-logprobs.mean()).backward()
    gradients = [p.grad for name, p in trunk.model.named_parameters() if "lora_B" in name]
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in gradients)
    write_weights(trunk, tmp_path / "out", adapters, full_tensors(trunk.model))
    # Merged into the plain source: with an untouched adapter (B is zero) nothing was rounded.
    before, after = load_decoder(source).state_dict(), load_decoder(tmp_path / "out").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_cannot_be_trained_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        load_trunk(tmp_path, CPU, FULL)
    source = write_tiny_directory(tmp_path / "source")
    (source / "quantize_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is quantised; train the model that it was made from"):
        load_trunk(source, CPU, FULL)


def test_a_missing_gpu_is_an_error_and_not_a_slow_run() -> None:
    if torch.cuda.is_available():
        assert choose_compute("cuda", "auto").device.type == "cuda"
        return
    with pytest.raises(TrainingError, match="torch sees no GPU; use --device cpu"):
        choose_compute("cuda", "auto")
    assert choose_compute("cpu", "float32").precision == torch.float32
