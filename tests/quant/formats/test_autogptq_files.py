"""Files that auto-gptq 0.7.1 itself wrote (tests/data/autogptq) give the logits that it computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quant.int4_linear import QuantizedLinear
from serving.model.weights import load_decoder

pytestmark = pytest.mark.unit

FILES = Path(__file__).resolve().parents[2] / "data" / "autogptq"
CASES = {"sym-4bit-g32": (4, 32), "asym-4bit-g32": (4, 32), "act-order-4bit-g32": (4, 32), "sym-8bit-row": (8, None)}


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_auto_gptq_gives_its_logits(name: str) -> None:
    expected = load_file(FILES / name / "expected.safetensors")
    decoder = load_decoder(FILES / name)
    with torch.no_grad():
        found = decoder(expected["ids"])
    # auto-gptq multiplies by the same weights in float32, in another order.
    assert float((found - expected["logits"]).abs().max()) < 1e-4 * float(expected["logits"].abs().max())


@pytest.mark.parametrize("name", CASES)
def test_what_such_a_file_says_of_itself_is_found(name: str) -> None:
    bits, group_size = CASES[name]
    matrices = [module.matrix for module in load_decoder(FILES / name).modules() if isinstance(module, QuantizedLinear)]
    assert len(matrices) == 7
    assert {(matrix.bits, matrix.group_size) for matrix in matrices} <= {
        (bits, group_size or inputs) for inputs in (64, 96)
    }
    assert any(matrix.group_of_input is not None for matrix in matrices) == name.startswith("act-order")
