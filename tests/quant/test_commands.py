"""`causerie quantize` with a tiny model, its real tokenizer, chat format and serving path; and its misuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quant import quantize_directory, texts
from quant.commands import ServingAccess, quantize, stored_dtype
from quant.errors import QuantizationError
from serving.cli import main
from tests.quant.tiny_models import PALM, write_source
from tests.serving.model.tiny_tokenizers import write_tokenizer

pytestmark = pytest.mark.unit

FEW = ("--samples", "8", "--seq-len", "64")


@pytest.fixture(autouse=True)
def short_held_out_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(texts, "HELD_OUT_TOKENS", 512)
    monkeypatch.setattr(texts, "HELD_OUT_SEQ_LEN", 64)
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
    monkeypatch.setattr(quantize_directory.QuantizationReport, "perplexity_increase_percent", 7.0)
    out = tmp_path / "out"
    assert main(["quantize", str(source), str(out), *FEW, "--max-perplexity-increase", "3"]) == 1
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith(
        "causerie: perplexity rose by 7.00 %, more than the 3 % allowed; nothing was written. Try"
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--group-size", "64"], "group size 64 does not divide every layer's inputs [64, 96]; these do: 32"),
        (["--samples", "100000"], "need at least"),
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


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["model"],
        ["model", "out", "--bits", "3"],
        ["model", "out", "--sym", "--asym"],
        ["model", "out", "--samples", "0"],
        ["model", "out", "--damp", "nan"],
        ["model", "out", "--eight-bit", "q_prj"],
    ],
)
def test_misuse_exits_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        quantize(arguments)
    assert stopped.value.code == 2
    assert "causerie quantize: error: " in capsys.readouterr().err


def test_help_teaches_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        quantize(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "examples:\n  causerie quantize" in text
    assert '{"messages": [{"role", "content"}' in text


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
