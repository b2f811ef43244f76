"""`causerie quantize` with a tiny model, its real tokenizer, chat format and serving path; and its misuse."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import pytest
import torch

from quant.commands import ServingAccess, merge, quantize, stored_dtype
from quant.errors import QuantizationError
from quant.formats.autogptq import gptq_settings
from quant.formats.checkpoint_format import CheckpointFormat
from quant.model_directory import read_manifest
from quant.report import quantization_report as report
from quant.run import texts
from serving.cli import main
from tests.quant.tiny_models import PALM, write_source
from tests.serving.model.tiny_tokenizers import write_tokenizer

pytestmark = pytest.mark.unit

FEW = ("--samples", "8", "--seq-len", "64")


@pytest.fixture(autouse=True)
def short_held_out_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(texts, "HELD_OUT_TOKENS", 512)
    monkeypatch.setattr(texts, "HELD_OUT_SEQ_LEN", 64)

    # Two engines in a process of their own take seconds.
    def no_speeds(_access: ServingAccess, directories: Sequence[Path]) -> list[None]:
        return [None for _ in directories]

    monkeypatch.setattr(ServingAccess, "decode_speeds", no_speeds)
    monkeypatch.setenv("CAUSERIE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = write_source(tmp_path / "source", vocab_size=2048)
    write_tokenizer("smollm2", directory)
    return directory


def test_a_directory_is_quantised_and_summed_up(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["quantize", "--act-order", str(source), str(out), *FEW, "--eight-bit", "down_proj"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{out}: 4 bits, group size 32")
    assert "perplexity" in printed.out
    assert "Writing done" in printed.err
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["served"]["perplexity"] == pytest.approx(report["plain"]["perplexity"], rel=0.05)


def test_a_palm_model_is_quantised_and_measured_on_the_serving_path(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source", torch.float16, vocab_size=2048, **PALM), tmp_path / "out"
    write_tokenizer("smollm2", source)
    assert main(["quantize", str(source), str(out), *FEW]) == 0
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["served"]["perplexity"] == pytest.approx(report["plain"]["perplexity"], rel=0.05)


def test_conversations_of_the_users_own_are_rendered_with_the_chat_format(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "hello " * 20}, {"role": "assistant", "content": "world " * 20}]
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(40)), encoding="utf-8")
    assert quantize([str(source), str(tmp_path / "out"), *FEW, "--calibration", str(path)]) == 0


def test_a_base_model_reads_conversations_as_text(source: Path, tmp_path: Path) -> None:
    (source / "chat_template.jinja").unlink()
    assert ServingAccess().chat_format_sha256(source) is None
    assert quantize([str(source), str(tmp_path / "out"), *FEW]) == 0


def test_a_limit_that_is_exceeded_exits_with_one_and_leaves_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report.QuantizationReport, "perplexity_increase_percent", 7.0)
    out = tmp_path / "out"
    assert main(["quantize", str(source), str(out), *FEW, "--max-perplexity-increase", "3"]) == 1
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith("causerie: perplexity cannot be kept within 3 %: the best that was reached is +")
    assert "nothing was written. Try" in complaint
    assert [path.name for path in tmp_path.glob("out*")] == []


def test_windows_are_no_longer_than_a_short_context(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source", vocab_size=2048, max_position_embeddings=128), tmp_path / "out"
    write_tokenizer("smollm2", source)
    assert quantize([str(source), str(out), "--samples", "8"]) == 0
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.config["seq_len"] == 128


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--group-size", "64"], "group size 64 does not divide every layer's inputs [64, 96]; these do: 32"),
        (["--samples", "100000"], "need at least"),
        (["--seq-len", "1025"], "--seq-len 1,025 is longer than the model's context of 1,024 tokens"),
        (["--calibration", "absent.jsonl"], "cannot be read"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_one(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    assert main(["quantize", str(source), str(tmp_path / "out"), *FEW, *arguments]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("causerie: ")
    assert complaint in last
    assert not (tmp_path / "out").exists()


def test_base_and_adapter_are_merged_and_quantised_in_one_go(tmp_path: Path) -> None:
    base, lora, out = tmp_path / "base", tmp_path / "my-lora", tmp_path / "out"
    write_source(base, torch.float32, vocab_size=2048)
    write_tokenizer("smollm2", base)
    write_lora(lora, {"model.layers.0.self_attn.v_proj": (64, 32), "model.layers.1.mlp.down_proj": (96, 64)})
    assert quantize([str(base), str(out), *FEW, "--adapter", str(lora)]) == 0
    manifest = read_manifest(out)
    assert manifest is not None
    assert [parent.name for parent in manifest.parents] == ["base", "my-lora"]
    assert "The adapter my-lora was merged" in (out / "quantization_report.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["base", "my-lora", "out"]
    merged = tmp_path / "merged"
    assert merge([str(base), str(lora), str(merged)]) == 0
    assert quantize([str(merged), str(tmp_path / "again"), *FEW]) == 0
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


def test_a_plan_is_printed_and_nothing_else_is_done(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize([str(source), str(tmp_path / "out"), "--plan", "--max-perplexity-increase", "2%"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[::2]] == ["memory", "disk", "time", "at"]
    assert "more if the perplexity budget is missed" in printed[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def refused(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that is printed; neither a plan nor progress stands before it."""
    assert main(["quantize", *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    (complaint,) = printed.err.splitlines()
    return complaint


@pytest.mark.parametrize("planned", [(), ("--plan",)], ids=["run", "plan"])
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--group-size", "64"], "group size 64 does not divide every layer's inputs"),
        (["--samples", "100000"], "need at least"),
        (["--calibration", "absent.jsonl"], "cannot be read"),
        (["--calibration", "broken.jsonl"], "broken.jsonl, line 2"),
        (["--calibration", "held_out.jsonl"], "on which the result is measured"),
        (["--adapter", "source"], "is not a peft adapter"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_plan(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
    planned: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    held_out = resources.files("quant").joinpath("data", "held_out.jsonl").read_bytes()
    (tmp_path / "held_out.jsonl").write_bytes(held_out)
    assert complaint in refused([str(source), "out", *FEW, *arguments, *planned], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("planned", [(), ("--plan",)], ids=["run", "plan"])
def test_a_name_that_is_taken_is_refused_before_the_model_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], planned: tuple[str, ...]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    complaint = refused([str(tmp_path / "nowhere"), str(tmp_path / "out"), *planned], capsys)
    assert "exists and is not empty; give the name of a new directory" in complaint


@pytest.mark.parametrize("planned", [(), ("--plan",)], ids=["run", "plan"])
def test_a_quantised_model_is_refused_before_the_plan(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], planned: tuple[str, ...]
) -> None:
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (source / "config.json").write_text(json.dumps(config))
    assert "is quantised already" in refused([str(source), str(tmp_path / "out"), *planned], capsys)


def test_a_plan_that_does_not_fit_is_printed_before_its_refusal(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant.run.machine.free_memory_bytes", lambda: 10**8)
    assert main(["quantize", str(source), str(tmp_path / "out"), *FEW, "--plan"]) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("memory ")
    assert "quantising would take" in printed.err


def test_an_adapter_is_planned_without_being_merged(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lora(tmp_path / "lora", {"model.layers.0.self_attn.v_proj": (64, 32)})
    assert (
        main(["quantize", str(source), str(tmp_path / "out"), *FEW, "--plan", "--adapter", str(tmp_path / "lora")]) == 0
    )
    assert "merged model" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "source"]


def write_lora(directory: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """A random adapter of rank 2. shapes: (inputs, outputs) by module."""
    from safetensors.torch import save_file

    directory.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    tensors: dict[str, torch.Tensor] = {}
    for module, (inputs, outputs) in shapes.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, inputs) * 0.1
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(outputs, 2) * 0.1
    save_file(tensors, directory / "adapter_model.safetensors")


def test_a_shuffled_order_warns_who_will_not_load_it(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize([str(source), str(tmp_path / "out"), *FEW, "--act-order=shuffled"]) == 0
    assert "causerie: warning: --act-order=shuffled: vLLM (CPU build)" in capsys.readouterr().err
    assert "| vLLM (CPU build) | no |" in (tmp_path / "out/quantization_report.md").read_text()


def test_version_2_is_written_where_it_is_asked_for(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize([str(source), str(tmp_path / "out"), *FEW, "--asym", "--format", "v2"]) == 0
    assert "causerie: warning: --format v2: vLLM (CPU build), AutoGPTQ 0.7 will not" in capsys.readouterr().err
    assert "| GPTQModel | yes |" in (tmp_path / "out/quantization_report.md").read_text()
    settings = gptq_settings(tmp_path / "out")
    assert settings is not None
    assert settings.checkpoint_format is CheckpointFormat.V2


def test_a_conversation_that_the_template_refuses_is_named(source: Path, tmp_path: Path) -> None:
    (source / "chat_template.jinja").write_text("{{ raise_exception('no chats here') }}")
    with pytest.raises(QuantizationError, match="cannot be rendered"):
        quantize([str(source), str(tmp_path / "out"), *FEW])


def test_weights_of_several_types_load_in_one_that_holds_them_all(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = write_source(tmp_path / "mixed")
    assert stored_dtype(directory) == torch.float16
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.bfloat16)
    save_file(tensors, directory / "model.safetensors")
    assert stored_dtype(directory) == torch.float32
