"""llama.cpp reads what `causerie export` writes: the same logits and the same tokens as here, for every family.

Run with `CAUSERIE_INTEROP=WORK pytest tests/interop`; WORK/llama_cpp is an environment with llama-cpp-python and numpy.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from quant.convert.export import export_gguf
from quant.progress import SilentProgress
from serving.model.tokenizer import ModelTokenizer
from serving.model.weights import load_decoder
from tests.quant.convert.test_export import LLAMA3_SCALING, QWEN2, QWEN3, write_gptq, write_plain
from tests.quant.tiny_models import PALM

pytestmark = [pytest.mark.system, pytest.mark.interop]

NUM_TOKENS = 96
TEXT = "hello 42,\nwell. a hell of a 7"
# Against the spread of the logits. What is multiplied by 16-bit weights is rounded to 16 bits, by 8-bit codes to 8.
PLAIN_TOLERANCE = 2e-2
QUANTIZED_TOLERANCE = 0.15

WORKER = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import numpy, llama_cpp
path, text, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = llama_cpp.Llama(path, n_ctx=len(ids), logits_all=True, n_threads=1, verbose=False)
model.eval(ids)
numpy.save(path + ".npy", model.scores[: len(ids)])
json.dump(model.tokenize(text.encode(), add_bos=False, special=False), answers)
"""


@pytest.fixture(scope="module")
def llama_cpp() -> Path:
    """The Python of an environment that has llama-cpp-python."""
    python = Path(os.environ.get("CAUSERIE_INTEROP", "/nonexistent")) / "llama_cpp" / "bin" / "python"
    if not python.exists():
        pytest.skip("CAUSERIE_INTEROP/llama_cpp/bin/python is not there; make it with pip install llama-cpp-python")
    return python


def relative_difference(directory: Path, llama_cpp: Path) -> float:
    """Largest difference of a logit between llama.cpp and our plain path, by the spread of ours.

    Also holds the tokens of a text against ours.
    """
    gguf = directory.parent / "model.gguf"
    export_gguf(directory, gguf, SilentProgress())
    ids = torch.randint(0, 128, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    command = [str(llama_cpp), "-c", WORKER, str(gguf), TEXT, json.dumps(ids.tolist())]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(answer.stdout) == ModelTokenizer.load(directory).encode(TEXT)
    with torch.inference_mode():
        ours = load_decoder(directory, dtype=torch.float32)(ids[None])[0].numpy()
    theirs = np.load(f"{gguf}.npy")
    return float(np.abs(ours - theirs).max() / ours.std())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": LLAMA3_SCALING, "rope_theta": 500_000.0},
        {"tie_word_embeddings": False, "attention_bias": True},
        QWEN2,
        QWEN3,
        PALM,
    ],
    ids=["llama", "llama3", "bias", "qwen2", "qwen3", "palm"],
)
def test_every_family_computes_the_same_logits_in_llama_cpp(
    tmp_path: Path, llama_cpp: Path, changes: dict[str, object]
) -> None:
    directory = write_plain(tmp_path / "model", changes)
    assert relative_difference(directory, llama_cpp) < PLAIN_TOLERANCE


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_codes_compute_the_same_logits_in_llama_cpp(tmp_path: Path, llama_cpp: Path, symmetric: bool) -> None:
    assert relative_difference(write_gptq(tmp_path, symmetric=symmetric), llama_cpp) < QUANTIZED_TOLERANCE
