"""Merging against peft's own `merge_and_unload`, on a tiny Llama; and everything that is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from quant.convert import merge
from quant.convert.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LowRank, read_adapter
from quant.convert.merge import merge_adapter, merged_weight
from quant.errors import CheckpointError
from quant.formats import tensor_files
from quant.model_directory import read_manifest
from quant.progress import SilentProgress

# Others' warnings about others' calls.
pytestmark = [
    pytest.mark.unit,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


def tiny_base(directory: Path, *, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory, max_shard_size="20KB")
    return model


def write_adapter(model: LlamaForCausalLM, directory: Path, **changes: object) -> LlamaForCausalLM:
    """A random adapter, and the model that peft makes of it."""
    settings: dict[str, object] = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    adapted = get_peft_model(model, PeftConfig(**{**settings, **changes}))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    adapted.save_pretrained(str(directory))
    return adapted.merge_and_unload()  # type: ignore[operator]


def merged_tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def rewrite_config(directory: Path, **changes: object) -> None:
    path = directory / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base, adapter = tmp_path / "base", tmp_path / "my-lora"
    write_adapter(tiny_base(base), adapter)
    return base, adapter


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"target_modules": "all-linear"},
        {"rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.down_proj": 6}, "alpha_pattern": {"q_proj": 3}},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "norm"]},
    ],
)
def test_result_is_what_peft_merges(tmp_path: Path, changes: dict[str, object]) -> None:
    base, adapter, out = tmp_path / "base", tmp_path / "my-lora", tmp_path / "out"
    expected = write_adapter(tiny_base(base), adapter, **changes).state_dict()
    before = merged_tensors(base)
    merge_adapter(base, adapter, out, SilentProgress())
    found = merged_tensors(out)
    assert set(found) == set(before) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-7)
    assert any(not torch.equal(found[name], before[name]) for name in found)


def test_fan_in_fan_out_turns_the_update_over() -> None:
    update = LowRank(torch.randn(2, 5), torch.randn(3, 2), 0.5)
    weight = torch.randn(3, 5)
    turned = merged_weight(weight.t(), update.transposed)
    torch.testing.assert_close(turned.t(), merged_weight(weight, update), rtol=0, atol=1e-6)


def test_an_adapter_of_transposed_weights_is_read_turned_over(pair: tuple[Path, Path]) -> None:
    _, adapter = pair
    plain = read_adapter(adapter).updates
    rewrite_config(adapter, fan_in_fan_out=True)
    for name, update in read_adapter(adapter).updates.items():
        assert update.shape == plain[name].shape[::-1]


def test_a_merge_by_runs_of_rows_gives_what_one_run_gives(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_adapter(*pair, tmp_path / "whole", SilentProgress())
    monkeypatch.setattr(tensor_files, "_RUN_BYTES", 1000)  # seven rows of a matrix
    merge_adapter(*pair, tmp_path / "runs", SilentProgress())
    whole, runs = merged_tensors(tmp_path / "whole"), merged_tensors(tmp_path / "runs")
    assert whole.keys() == runs.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(runs[name], tensor, rtol=0, atol=2e-7)


def test_half_precision_is_rounded_once() -> None:
    update = LowRank(torch.randn(2, 5).to(torch.bfloat16), torch.randn(3, 2).to(torch.bfloat16), 0.5)
    weight = torch.randn(3, 5).to(torch.bfloat16)
    exact = weight.double() + 0.5 * update.up.double() @ update.down.double()
    assert torch.equal(merged_weight(weight, update), exact.float().to(torch.bfloat16))


def test_result_is_a_model_directory_that_knows_both_parents(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    merge_adapter(base, adapter, tmp_path / "out", SilentProgress())
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert (tmp_path / "out/model.safetensors.index.json").is_file()
    assert not (tmp_path / "out" / ADAPTER_CONFIG).exists()
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert (manifest.stage, [parent.name for parent in manifest.parents]) == ("merge", ["base", "my-lora"])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"use_dora": True}, "use_dora is set: DoRA"),
        ({"peft_type": "LOHA"}, "kind 'LOHA'; only LORA"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"layer_replication": [[0, 2]]}, "an adapter that repeats layers"),
        ({"r": 0}, "r is 0, expected a positive number"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"r": 3}, "rank 3 makes them"),
        ({"rank_pattern": {"(": 3}}, "is not a pattern of module names"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_its_name(
    pair: tuple[Path, Path], tmp_path: Path, changes: dict[str, object], complaint: str
) -> None:
    base, adapter = pair
    rewrite_config(adapter, **changes)
    with pytest.raises(CheckpointError) as refused:
        merge_adapter(base, adapter, tmp_path / "out", SilentProgress())
    assert complaint in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "my-lora"]


def without_b(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    gone = next(name for name in tensors if "lora_B" in name)
    return {name: tensor for name, tensor in tensors.items() if name != gone}


def of_another_size(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros(7, 4) if "lora_B" in name else tensor for name, tensor in tensors.items()}


def of_a_longer_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("layers.1", "layers.9"): tensor for name, tensor in tensors.items()}


def on_embeddings(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 64)}


def not_finite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor / 0 for name, tensor in tensors.items()}


def no_tensors(_tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {}


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (without_b, "has no lora_B"),
        (of_another_size, "does not fit"),
        (of_a_longer_model, "give the base that it was trained on"),
        (on_embeddings, "LoRA on embeddings"),
        (not_finite, "not finite"),
        (no_tensors, "holds no tensors"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_nothing(
    pair: tuple[Path, Path],
    tmp_path: Path,
    damage: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    complaint: str,
) -> None:
    base, adapter = pair
    save_file(damage(load_file(adapter / ADAPTER_WEIGHTS)), adapter / ADAPTER_WEIGHTS)
    with pytest.raises(CheckpointError, match=complaint):
        merge_adapter(base, adapter, tmp_path / "out", SilentProgress())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "my-lora"]


def test_a_pickled_adapter_is_refused_by_its_name(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    (adapter / ADAPTER_WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is pickled, which is never read"):
        merge_adapter(base, adapter, tmp_path / "out", SilentProgress())


@pytest.mark.parametrize("broken", ["base", "my-lora"])
def test_a_file_cut_short_is_refused_by_its_name(pair: tuple[Path, Path], tmp_path: Path, broken: str) -> None:
    path = min((tmp_path / broken).glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{path.name} is not a safetensors file that can be read"):
        merge_adapter(*pair, tmp_path / "out", SilentProgress())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed", ["embed_tokens", "lm_head"])
def test_shared_embeddings_are_not_untied_in_silence(tmp_path: Path, changed: str) -> None:
    base, adapter = tmp_path / "base", tmp_path / "my-lora"
    model = tiny_base(base, tied=True)
    write_adapter(tiny_base(tmp_path / "untied"), adapter, modules_to_save=[changed])
    assert model.config.tie_word_embeddings
    with pytest.raises(CheckpointError, match=r"shares (with its head|its head with)"):
        merge_adapter(base, adapter, tmp_path / "out", SilentProgress())


def test_a_quantised_base_and_a_full_out_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        merge_adapter(base, adapter, adapter, SilentProgress())
    config = json.loads((base / "config.json").read_text())
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(CheckpointError, match="merge into the source weights"):
        merge_adapter(base, adapter, tmp_path / "out", SilentProgress())


def write_unprefixed_bloom(base: Path, adapter: Path) -> None:
    """Names as the hub's BLOOM files have them, beside stale weights in another format; an adapter as peft names it."""
    base.mkdir()
    adapter.mkdir()
    config = {"architectures": ["BloomForCausalLM"], "hidden_size": 8, "n_head": 2}
    (base / "config.json").write_text(json.dumps(config))
    (base / "pytorch_model.bin").write_bytes(b"stale")
    stored = {
        "h.0.self_attention.query_key_value.weight": torch.zeros(24, 8),
        "word_embeddings.weight": torch.ones(4, 8),
    }
    save_file(stored, base / "model.safetensors")
    (adapter / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))


def test_a_base_whose_files_leave_out_the_prefix_is_merged_by_the_adapters_names(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "my-lora"
    write_unprefixed_bloom(base, adapter)
    module = "base_model.model.transformer.h.0.self_attention.query_key_value"
    a, b = torch.ones(2, 8), torch.ones(24, 2)
    save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, adapter / ADAPTER_WEIGHTS)
    merge_adapter(base, adapter, tmp_path / "out", SilentProgress())
    merged = merged_tensors(tmp_path / "out")
    assert torch.equal(merged["h.0.self_attention.query_key_value.weight"], torch.full((24, 8), 4.0))
    assert torch.equal(merged["word_embeddings.weight"], torch.ones(4, 8))
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_shared_embeddings_of_another_family_are_not_untied_in_silence(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "my-lora"
    write_unprefixed_bloom(base, adapter)
    name = "base_model.model.transformer.word_embeddings.weight"
    save_file({name: torch.zeros(4, 8)}, adapter / ADAPTER_WEIGHTS)
    with pytest.raises(CheckpointError, match="shares with its head"):
        merge_adapter(base, adapter, tmp_path / "out", SilentProgress())


def test_an_interrupted_merge_leaves_nothing(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "write_manifest", stop)
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(*pair, tmp_path / "out", SilentProgress())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "my-lora"]


def test_a_merged_model_of_a_killed_run_is_removed_by_the_next(pair: tuple[Path, Path], tmp_path: Path) -> None:
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    left = tmp_path / f".out.partial-{finished.pid}-0123"
    left.mkdir()
    with merge.merged_for_a_while(*pair, tmp_path / "out", SilentProgress()) as merged:
        assert merged.directory.name == "base+my-lora"
        assert not left.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "my-lora"]
