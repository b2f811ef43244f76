"""Files with a quantised head load in GPTQModel and vLLM; those with quantised embeddings as the report says.

Run as `test_files.py` is.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from quant.method.gptq import GptqOptions
from quant.options import QuantizeOptions
from quant.progress import SilentProgress
from quant.run import texts
from quant.run.quantize_directory import quantize_with
from tests.interop.test_files import GPTQMODEL_TOLERANCE, MODEL, VLLM_TOLERANCE, answer, ask, our_logprobs
from tests.quant.tiny_models import TinyAccess, write_source

pytestmark = [pytest.mark.system, pytest.mark.interop]

# Whether the table is tied, bits of the head, bits of the embeddings.
CASES = {
    "head-4": (False, 4, None),
    "head-8": (False, 8, None),
    "embeddings-4": (False, None, 4),
    "tied-4": (True, 4, 4),
}
TOOLS = {"gptqmodel": ("GPTQModel", GPTQMODEL_TOLERANCE), "vllm": ("vLLM (CPU build)", VLLM_TOLERANCE)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model directory for each of CASES."""
    folder = tmp_path_factory.mktemp("ends")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "HELD_OUT_TOKENS", 128)
        patch.setattr(texts, "HELD_OUT_SEQ_LEN", 64)
        for name, (is_tied, head, embeddings) in CASES.items():
            changes = {**MODEL, "tie_word_embeddings": is_tied}
            source = write_source(folder / f"source-{name}", torch.float16, **changes)
            # As in test_files.py: GPTQModel loads no model without a tokenizer.
            words = {str(token): token for token in range(128)}
            Tokenizer(WordLevel(words, unk_token="0")).save(str(source / "tokenizer.json"))
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "0", "eos_token": "2"}
            (source / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
            gptq = GptqOptions(group_size=32)
            options = QuantizeOptions(gptq, samples=8, seq_len=64, head_bits=head, embedding_bits=embeddings)
            quantize_with(TinyAccess(serves=False), source, folder / name, options, SilentProgress())
    return folder


@pytest.fixture(scope="module", params=list(TOOLS))
def answers(
    request: pytest.FixtureRequest, written: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A tool, and the folder with what it makes of each of CASES."""
    tool = str(request.param)
    folder = tmp_path_factory.mktemp(tool)
    python: Path = request.getfixturevalue(tool)
    ask(python, f"load-{tool}", folder, {"directories": [str(written / name) for name in CASES]})
    return tool, folder


@pytest.mark.parametrize("name", CASES)
def test_a_tool_computes_the_same_where_the_report_says_that_it_loads(
    name: str, answers: tuple[str, Path], written: Path
) -> None:
    tool, folder = answers
    named, tolerance = TOOLS[tool]
    report = json.loads((written / name / "quantization_report.json").read_text(encoding="utf-8"))
    says = next(loader["loads"] for loader in report["who_loads"] if loader["tool"] == named)
    loads = not (folder / f"{name}.txt").exists()
    if loads:
        found = answer(folder, name)
        expected = our_logprobs(written / name)[:, : found.shape[1]]
        loads = float((found - expected).abs().max()) < tolerance
    assert loads == says
