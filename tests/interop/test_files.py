"""Files written here load in the tools that the report names, with the same logits; GPTQModel's files load here.

Run with `CAUSERIE_INTEROP=WORK pytest -m interop`, WORK made by `python -m benchmarks.quantizer_setup WORK`.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn

from quant.formats.autogptq import pack_linear
from quant.formats.autogptq_writer import write_checkpoint
from quant.formats.checkpoint_format import CheckpointFormat
from quant.method.gptq import ActOrder, GptqOptions, quantize_matrix
from quant.method.matrix import QuantizedMatrix
from quant.options import LinearChoice
from quant.report.loaders import WrittenFormat, who_loads
from serving.model.weights import load_decoder
from tests.quant.tiny_models import tiny_ids, write_source

pytestmark = [pytest.mark.system, pytest.mark.interop]

WORKER = Path(__file__).with_name("worker.py")
# Of log-probabilities, which here span about 10: GPTQModel multiplies in float16 at most, vLLM in bfloat16.
GPTQMODEL_TOLERANCE = 0.02
VLLM_TOLERANCE = 0.1
# One process and a small cache: the models are tiny.
VLLM_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
IDS = tiny_ids(2, 24, seed=3)
MODEL: Mapping[str, object] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@dataclass(frozen=True, slots=True)
class Case:
    """`other_bits`: of the linears whose names contain a key."""

    options: GptqOptions
    version: CheckpointFormat = CheckpointFormat.V1
    other_bits: Mapping[str, int] = field(default_factory=dict[str, int])


CASES = {
    **{
        f"{bits}bit-{'sym' if symmetric else 'asym'}-{group}": Case(
            GptqOptions(bits=bits, group_size=group, symmetric=symmetric),
            CheckpointFormat.V1 if symmetric else CheckpointFormat.V2,
        )
        for bits in (4, 8)
        for symmetric in (True, False)
        for group in (-1, 32, 128)
    },
    "static": Case(GptqOptions(group_size=32, act_order=ActOrder.STATIC)),
    "shuffled": Case(GptqOptions(group_size=32, act_order=ActOrder.SHUFFLED)),
    "version-2": Case(GptqOptions(group_size=32), CheckpointFormat.V2),
    "asym-version-1": Case(GptqOptions(group_size=32, symmetric=False)),
    "mixed-bits": Case(GptqOptions(group_size=32), other_bits={"self_attn.": 8}),
}
# By words of the reason. vLLM's is that of its CPU build.
REFUSALS = {
    ("gptqmodel", "asym-version-1"): "sym=False",
    ("vllm", "asym-version-1"): "sym=False",
    ("vllm", "4bit-asym-32"): "sym=False",
    ("vllm", "8bit-sym-32"): "uint8b128",
    ("vllm", "8bit-sym-128"): "uint8b128",
    ("vllm", "mixed-bits"): "uint8b128",
    ("vllm", "shuffled"): "desc_act=False",
}
TOOLS = {"gptqmodel": "GPTQModel", "vllm": "vLLM (CPU build)"}
TOLERANCES = {"gptqmodel": GPTQMODEL_TOLERANCE, "vllm": VLLM_TOLERANCE}
PLAINEST: Mapping[str, object] = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False}
GPTQMODEL_CASES: Mapping[str, Mapping[str, object]] = {
    "4bit-sym-32": PLAINEST,
    "4bit-asym-32": {"bits": 4, "group_size": 32, "sym": False, "desc_act": False},
    "8bit-sym-128": {"bits": 8, "group_size": 128, "sym": True, "desc_act": False},
    "4bit-sym-row": {"bits": 4, "group_size": -1, "sym": True, "desc_act": False, "act_group_aware": False},
    "desc-act": {"bits": 4, "group_size": 32, "sym": True, "desc_act": True, "act_group_aware": False},
    "version-2": {"bits": 4, "group_size": 32, "sym": False, "desc_act": False, "format": "gptq_v2"},
    "mixed-bits": {**PLAINEST, "dynamic": {r"+:.*\.mlp\..*": {"bits": 8}}},
    "mixed-groups": {**PLAINEST, "dynamic": {r"+:.*\.down_proj.*": {"group_size": 64}}},
    "some-left-plain": {**PLAINEST, "dynamic": {r"-:.*\.o_proj.*": {}}},
}
# GPTQModel gives such a head 8 bits, and takes none that is tied to the embeddings.
GPTQMODEL_HEAD_CASES: Mapping[str, Mapping[str, object]] = {"quantised-head": {**PLAINEST, "lm_head": True}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_source(tmp_path_factory.mktemp("source") / "plain")


def _write_source(directory: Path, **changes: object) -> Path:
    write_source(directory, torch.float16, **MODEL, **changes)
    # GPTQModel loads no model without a tokenizer.
    words = {str(token): token for token in range(128)}
    Tokenizer(WordLevel(words, unk_token="0")).save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "0", "eos_token": "2"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model directory for each of CASES."""
    folder = tmp_path_factory.mktemp("written")
    for name, case in CASES.items():
        (folder / name).mkdir()
        matrices = _quantize(source, case)
        packed = {
            f"{linear}.{part}": tensor
            for linear, matrix in matrices.items()
            for part, tensor in pack_linear(matrix, case.version).items()
        }
        save_file(packed, folder / f"{name}.safetensors")
        choices = {linear: LinearChoice(matrix.bits, case.options.group_size) for linear, matrix in matrices.items()}
        write_checkpoint(
            source,
            folder / name,
            [folder / f"{name}.safetensors"],
            choices,
            case.options,
            checkpoint_format=case.version,
        )
    return folder


def _quantize(source: Path, case: Case) -> dict[str, QuantizedMatrix]:
    matrices: dict[str, QuantizedMatrix] = {}
    for name, module in load_decoder(source).named_modules():
        if isinstance(module, nn.Linear) and ".layers." in f".{name}":
            bits = next((bits for key, bits in case.other_bits.items() if key in name), case.options.bits)
            options = GptqOptions(bits, case.options.group_size, case.options.symmetric, case.options.act_order)
            generator = torch.Generator().manual_seed(len(matrices))
            inputs = torch.randn((256, module.in_features), generator=generator)
            inputs *= torch.rand(module.in_features, generator=generator) + 0.1
            full_name = name if name.startswith("model.") else f"model.{name}"
            matrices[full_name] = quantize_matrix(module.weight, inputs.t() @ inputs / 256, options).matrix
    return matrices


def our_logprobs(directory: Path) -> Tensor:
    with torch.no_grad():
        return load_decoder(directory)(IDS).float().log_softmax(-1)


def ask(python: Path, kind: str, folder: Path, task: Mapping[str, object]) -> None:
    path = folder / "task.json"
    path.write_text(json.dumps({"results": str(folder), "ids": IDS.tolist(), **task}), encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PYTHONPATH")}
    environment = {**kept, **VLLM_SETTINGS, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, WORKER, kind, path], capture_output=True, text=True, check=False, env=environment, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-2000:]


def answer(folder: Path, name: str) -> Tensor:
    refusal = folder / f"{name}.txt"
    assert not refusal.exists(), refusal.read_text(encoding="utf-8")
    return load_file(folder / f"{name}.safetensors")["logprobs"]


@pytest.fixture(scope="module", params=list(TOOLS))
def answers(
    request: pytest.FixtureRequest, written: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A tool, and the folder with what it makes of each of CASES."""
    tool = str(request.param)
    python: Path = request.getfixturevalue(tool)
    folder = tmp_path_factory.mktemp(tool)
    ask(python, f"load-{tool}", folder, {"directories": [str(written / name) for name in CASES]})
    return tool, folder


def written_format(case: Case) -> WrittenFormat:
    assert case.options.group_size is not None
    return WrittenFormat(
        bits=frozenset({case.options.bits, *case.other_bits.values()}),
        group_sizes=frozenset({case.options.group_size}),
        symmetric=case.options.symmetric,
        act_order=case.options.act_order.value,
        checkpoint_format=case.version,
    )


@pytest.mark.parametrize("name", CASES)
def test_a_tool_computes_the_same_where_the_report_says_that_it_loads(
    name: str, answers: tuple[str, Path], written: Path
) -> None:
    """Where it says the opposite, the tool refuses, or loads another model. When this fails, a tool has learnt it."""
    tool, folder = answers
    loaders = {loader.tool: loader for loader in who_loads(written_format(CASES[name]))}
    assert loaders[TOOLS[tool]].loads == computes_the_same(folder, name, written, TOLERANCES[tool])
    if (tool, name) in REFUSALS:
        assert REFUSALS[tool, name] in (folder / f"{name}.txt").read_text(encoding="utf-8")


def computes_the_same(folder: Path, name: str, written: Path, tolerance: float) -> bool:
    if (folder / f"{name}.txt").exists():
        return False
    found = answer(folder, name)
    expected = our_logprobs(written / name)[:, : found.shape[1]]
    return float((found - expected).abs().max()) < tolerance


def test_another_models_logits_are_outside_the_tolerances(written: Path) -> None:
    """So that a wrong weight is seen."""
    logits = our_logprobs(written / "4bit-sym-32")
    for other in ("4bit-sym-128", "8bit-sym-32"):
        assert float((logits - our_logprobs(written / other)).abs().max()) > max(TOLERANCES.values())


@pytest.fixture(scope="module")
def from_gptqmodel(gptqmodel: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("from-gptqmodel")
    calibration = tiny_ids(32, 64, seed=1).tolist()
    untied = _write_source(folder / "untied", tie_word_embeddings=False)
    for model, cases in ((source, GPTQMODEL_CASES), (untied, GPTQMODEL_HEAD_CASES)):
        task = {"source": str(model), "calibration": calibration, "cases": cases}
        ask(gptqmodel, "quantize-gptqmodel", folder, task)
    return folder


@pytest.mark.parametrize("name", [*GPTQMODEL_CASES, *GPTQMODEL_HEAD_CASES])
def test_files_of_gptqmodel_compute_the_same_here(name: str, from_gptqmodel: Path) -> None:
    expected = answer(from_gptqmodel, name)
    assert float((our_logprobs(from_gptqmodel / name) - expected).abs().max()) < GPTQMODEL_TOLERANCE
