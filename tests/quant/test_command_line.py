"""The flags of `causerie quantize` and `causerie merge`: each explained, read, or refused with what was meant."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from quant.command_line import act_order_warning, format_warning, parse_merge, parse_quantize
from quant.commands_export import export
from quant.formats.checkpoint_format import CheckpointFormat

pytestmark = pytest.mark.unit

FLAGS = (
    *("--plan", "--adapter", "--bits", "--eight-bit", "--group-size", "--sym", "--asym", "--format"),
    *("--head-bits", "--embedding-bits"),
    *("--act-order", "--mse-search", "--damp", "--calibration", "--samples", "--seq-len"),
    *("--seed", "--max-perplexity-increase"),
)


def help_of(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        parse_quantize(["--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_every_flag_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys)
    listed = re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE)
    assert sorted(listed) == sorted(FLAGS)
    for flag in FLAGS:
        explanation = re.search(rf"^  {flag}\b.*?(?=^  --|\n\n)", text, re.MULTILINE | re.DOTALL)
        assert explanation is not None
        # Beyond the flag, its metavar and its choices.
        assert len(explanation[0].split()) >= 6, flag


def test_help_teaches_with_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"^  causerie quantize (.*?)(?:   .*)?$", help_of(capsys), re.MULTILINE)
    assert len(examples) >= 5
    for example in examples:
        words = example.partition("  ")[0].split()
        assert parse_quantize(words[: words.index("the")] if "the" in words else words).out.name in ("my-model", "qwen")


def test_the_defaults_are_the_format_that_any_engine_loads() -> None:
    found = parse_quantize(["model", "out"])
    assert (found.bits, found.group_size, found.sym, found.act_order, found.mse_search) == (4, None, True, "none", "on")
    assert (found.adapter, found.plan, found.format) == (None, False, CheckpointFormat.V1)
    assert (found.head_bits, found.embedding_bits) == (None, None)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["--act-order", "model", "out"], "static"),
        (["model", "out", "--act-order"], "static"),
        (["model", "out", "--act-order", "--asym"], "static"),
        (["--act-order=shuffled", "model", "out"], "shuffled"),
        (["model", "out", "--act-order", "shuffled"], "shuffled"),
    ],
)
def test_act_order_alone_is_the_static_one(words: list[str], kind: str) -> None:
    found = parse_quantize(words)
    assert (found.model, found.out, found.act_order) == ("model", Path("out"), kind)


@pytest.mark.parametrize("written", ["2%", "2", "2.0", " 2 %"])
def test_a_budget_is_a_percentage_with_or_without_its_sign(written: str) -> None:
    assert parse_quantize(["model", "out", "--max-perplexity-increase", written]).max_perplexity_increase == 2.0


@pytest.mark.parametrize("size", [-1, 32, 64, 128])
def test_group_sizes_include_the_whole_row(size: int) -> None:
    assert parse_quantize(["model", "out", "--group-size", str(size)]).group_size == size


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["model"], "required: OUT"),
        (["model", "out", "--bits", "3"], "invalid choice: 3"),
        (["model", "out", "--group-sise", "64"], "unknown argument --group-sise; did you mean --group-size?"),
        (["model", "out", "--group", "64"], "unknown argument --group; did you mean --group-size?"),
        (["model", "out", "more"], "unknown argument more"),
        (["model", "out", "--group-size", "0"], "give 128, 64, 32, or -1"),
        (["model", "out", "--group-size", "many"], "'many' is not a whole number"),
        (["model", "out", "--act-order=dynamic"], "invalid choice: 'dynamic'"),
        (["model", "out", "--eight-bit", "q_prj"], "'q_prj' is no linear of a layer"),
        (["model", "out", "--max-perplexity-increase", "-2%"], "expected one argument"),
        (["model", "out", "--max-perplexity-increase=0%"], "is not a positive number"),
        (["model", "out", "--damp", "nan"], "is not a positive number"),
        (["model", "out", "--sym", "--asym"], "not allowed with"),
        (["model", "out", "--format", "gptq"], "'gptq' is no version of the layout; give v1 or v2"),
    ],
)
def test_misuse_leaves_with_two_and_says_what_was_meant(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parse_quantize(words)
    assert left.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_shuffled_order_names_who_will_not_load_it() -> None:
    warning = act_order_warning("shuffled", symmetric=True)
    assert warning is not None
    assert "vLLM (CPU build), llama.cpp, Ollama will not load" in warning
    assert act_order_warning("static", symmetric=True) is None
    assert act_order_warning("none", symmetric=True) is None


def test_an_asymmetric_result_is_told_which_version_serves_whom() -> None:
    warning = format_warning(symmetric=False, checkpoint_format=CheckpointFormat.V1)
    assert warning == (
        "--asym: GPTQModel, vLLM (CPU build) will not load the result; "
        "with --format v2, vLLM (CPU build), AutoGPTQ 0.7 will not"
    )
    assert format_warning(symmetric=True, checkpoint_format=CheckpointFormat.V1) is None
    warning = format_warning(symmetric=True, checkpoint_format=parse_quantize(["m", "o", "--format", "v2"]).format)
    assert warning == "--format v2: AutoGPTQ 0.7 will not load the result"


def test_merge_takes_base_adapter_and_out(capsys: pytest.CaptureFixture[str]) -> None:
    found = parse_merge(["base", "lora", "out"])
    assert (found.base, found.adapter, found.out) == ("base", Path("lora"), Path("out"))
    with pytest.raises(SystemExit):
        parse_merge(["base", "lora"])
    assert "required: OUT" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", str(2**63), "1.5"])
def test_a_seed_that_no_generator_takes_is_misuse(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_quantize(["model", "out", "--seed", seed])
    assert "argument --seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "answer"), [("--embedings", "did you mean --embeddings?"), ("--emb", "unknown argument")]
)
def test_export_takes_whole_flag_names_only(flag: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        export(["model", "out.gguf", flag, "q8_0"])
    assert answer in capsys.readouterr().err
