"""Blocks and orders of rows against the `gguf` package and llama.cpp's converter."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as GgmlType
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.formats.gguf_blocks import permute_rows, round_to_q8_0
from quant.formats.gguf_conversion import unpermute_rows
from tests.quant.tiny_gguf import HEADS
from tests.quant.tiny_gguf import permute_rows as reference_permutation

pytestmark = pytest.mark.unit


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e-6, 1.0, 1e3]))
def test_rounding_to_eight_bits_is_the_packages(seed: int, size: float) -> None:
    values = (np.random.default_rng(seed).normal(size=(3, 64)) * size).astype(np.float32)
    np.testing.assert_array_equal(round_to_q8_0(values), gguf.quantize(values, GgmlType.Q8_0))


def test_permutation_is_the_converters_and_the_readers_undoes_it() -> None:
    values = np.arange(HEADS * 16 * 3, dtype=np.float32).reshape(-1, 3)
    permuted = permute_rows(values, HEADS)
    np.testing.assert_array_equal(permuted, reference_permutation(values, HEADS))
    np.testing.assert_array_equal(unpermute_rows(torch.from_numpy(permuted), HEADS).numpy(), values)
