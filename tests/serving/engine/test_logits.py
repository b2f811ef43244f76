"""Whole-sequence logits of the serving path against the plain decoder."""

from __future__ import annotations

import pytest
import torch

from serving.engine.logits import serving_logits
from serving.engine.prepare import prepare
from tests.serving.engine.tiny import make_decoder, prompt_of

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("chunk_tokens", [256, 16, 5])
def test_exact_path_equals_the_decoder_in_any_chunking(chunk_tokens: int) -> None:
    decoder, ids = make_decoder(), torch.tensor(prompt_of(50))
    with torch.no_grad():
        expected = decoder(ids.unsqueeze(0))[0]
    found = serving_logits(prepare(decoder, exact=True), ids, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_fast_path_differs_by_rounding_only_and_a_wrong_layer_by_more() -> None:
    decoder, ids = make_decoder(), torch.tensor(prompt_of(50))
    with torch.no_grad():
        expected = decoder(ids.unsqueeze(0))[0]
        found = serving_logits(prepare(decoder, exact=False), ids)
        assert relative(found, expected) < 0.02
        decoder.model.layers[1].self_attn.v_proj.weight.mul_(1.5)  # type: ignore[union-attr]
        broken = serving_logits(prepare(decoder, exact=False), ids)
        assert relative(broken, expected) > 0.04


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
