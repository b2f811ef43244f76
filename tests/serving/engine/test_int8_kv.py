"""The int8 KV cache: how far off a kept number may be, and an engine that decodes from one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.int4_linear import relative_error
from quant.native.library import load_library
from serving.engine.engine import Engine
from serving.engine.int8_rows import dequantize_rows, quantize_rows
from serving.engine.kv_blocks import BLOCK_SIZE, KVCache, KVLayout
from serving.engine.logits import serving_logits
from serving.engine.prepare import PreparedModel, prepare, prepare_live
from serving.engine.requests import ScoreRequest
from serving.engine.runner import run_chunks
from serving.engine.scheduler import Chunk
from serving.engine.sequence import Sequence
from tests.serving.engine.engines import engine_of, generate, run, tokens
from tests.serving.engine.tiny import NATIVE_SPEC, PALM_SPEC, SPEC, make_decoder, prompt_of, quantized_decoder

pytestmark = pytest.mark.unit
needs_native = pytest.mark.skipif(load_library() is None, reason="no native kernels on this machine")

# Half a step, and what float32 itself rounds.
HALF_STEP = 0.5001
# What the cache costs tiny random models; a wrong scale costs ten times as much.
TOLERANCE = 0.03

NUMBERS = st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32)


@given(st.lists(NUMBERS, min_size=1, max_size=64), st.integers(min_value=-40, max_value=6))
def test_a_number_is_at_most_half_a_step_off(numbers: list[float], exponent: int) -> None:
    row = torch.tensor(numbers) * 2.0**exponent
    row[row.abs() < 1e-35] = 0
    codes, scale = quantize_rows(row)
    found = dequantize_rows(codes, scale, torch.float32)
    assert float((found - row).abs().max()) <= HALF_STEP * float(scale)
    assert int(codes.abs().max()) <= 127
    assert float(scale) <= float(row.abs().max()) / 127 * (1 + 2**-8)


def test_rows_of_zeros_and_of_next_to_nothing_come_back_finite() -> None:
    rows = torch.tensor([[0.0, -0.0], [1e-38, 0.0], [1e-44, 1e-44]])
    found = dequantize_rows(*quantize_rows(rows), torch.float32)
    assert float((found - rows).abs().max()) < 1e-36


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_written_is_read_by_runs_and_by_blocks(dtype: torch.dtype) -> None:
    layout = KVLayout(num_layers=2, num_kv_heads=3, head_dim=8, dtype=dtype, is_int8=True)
    cache = KVCache(layout, num_blocks=8)
    slots = torch.tensor([3 * BLOCK_SIZE + i for i in range(20)])
    written = torch.randn(20, 2 * layout.width, generator=torch.Generator().manual_seed(0)).to(dtype)
    cache.write(1, slots, written)
    keys, values = cache.read_run(1, 3 * BLOCK_SIZE, 20)
    expected = written.view(20, 2, 3, 8).permute(1, 2, 0, 3)  # (keys then values, kv heads, tokens, head dim)
    for found, wanted in ((keys, expected[0]), (values, expected[1])):
        assert found.dtype == dtype
        assert relative_error(found, wanted) < 0.01
    by_blocks = cache.read_blocks(1, torch.tensor([[3, 4], [4, 3]]))
    for found, run_of_slots in zip(by_blocks, (keys, values), strict=True):
        assert torch.equal(found[0, :, :20], run_of_slots)
        assert torch.equal(found[1, :, BLOCK_SIZE:], found[0, :, :BLOCK_SIZE])
        assert not found[0, :, 20:].any()
    assert not cache.read_run(0, 0, 20)[0].any()


def test_a_token_takes_about_half_and_the_budget_holds_what_fits() -> None:
    model = prepare(make_decoder(NATIVE_SPEC), exact=False)
    plain, int8 = (KVLayout.of(model.spec, model.dtype, is_int8=is_int8) for is_int8 in (False, True))
    assert int8.block_bytes / plain.block_bytes == pytest.approx((32 + 2) / 64)  # of a head of 32
    num_blocks = 100
    engines = [Engine(model, kv_bytes=num_blocks * plain.block_bytes, tokenizer=None, int8_kv=i) for i in (False, True)]
    found = [engine.stats().num_total_blocks for engine in engines]
    assert found == [num_blocks, num_blocks * plain.block_bytes // int8.block_bytes]
    cache = engines[1]._cache
    assert cache._scales is not None
    assert cache._data.nbytes + cache._scales.nbytes == found[1] * int8.block_bytes


def test_an_exact_model_refuses() -> None:
    with pytest.raises(ValueError, match="an exact model rounds nothing"):
        Engine(prepare(make_decoder(), exact=True), kv_bytes=1 << 20, tokenizer=None, int8_kv=True)


@pytest.mark.parametrize(
    "make_model",
    [lambda: prepare(make_decoder(PALM_SPEC), exact=False), lambda: prepare_live(make_decoder(SPEC), torch.float32)],
    ids=["palm in bfloat16", "live in float32"],
)
def test_models_without_a_native_step_decode_from_it(make_model: Callable[[], PreparedModel]) -> None:
    model, ids = make_model(), torch.tensor(prompt_of(100))
    assert model.native is None
    expected = serving_logits(model, ids, chunk_tokens=30)
    found = serving_logits(model, ids, chunk_tokens=30, int8_kv=True)
    assert 0 < relative_error(found, expected) < TOLERANCE


def test_many_streams_through_torch_are_preempted_and_go_on() -> None:
    """On float32, where what a batch rounds differently does not change a token."""
    model = prepare_live(make_decoder(), torch.float32)
    requests = [generate(f"r{i}", prompt_of(5 + i, seed=i) * 3, 40) for i in range(4)]
    crowd = engine_of(9, model=model, int8_kv=True, max_step_tokens=24)
    for request in requests:
        crowd.submit(request)
    events = run(crowd)
    assert crowd.stats().num_preemptions > 0
    for request in requests:
        alone = engine_of(model=model, int8_kv=True, prefix_cache=False)
        alone.submit(request)
        assert tokens(events, request.request_id) == tokens(run(alone), request.request_id)


@needs_native
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_native_code_keeps_the_same_numbers_within_half_a_step(head_dim: int) -> None:
    """Keys and values of the first layer do not depend on the cache: the bfloat16 one has them nearly exactly."""
    model = prepare(quantized_decoder(replace(NATIVE_SPEC, head_dim=head_dim)), exact=False)
    ids, blocks = prompt_of(100), [8, 1, 2, 3, 7, 6, 0]
    sequence = Sequence(ScoreRequest(request_id="a", ids=ids), 0, 0, ids, len(ids), blocks=blocks)
    caches = [
        KVCache(KVLayout.of(model.spec, dtype, is_int8=is_int8), 9)
        for dtype, is_int8 in ((torch.bfloat16, False), (torch.float32, True))
    ]
    with torch.inference_mode():
        for cache in caches:
            run_chunks(model, cache, [Chunk(sequence, 0, 100)])
    table = torch.tensor([blocks])
    scales = caches[1]._scales
    assert scales is not None
    steps = scales[0, blocks].permute(1, 2, 0, 3).flatten(2).to(torch.float32)  # (keys then values, kv heads, slots)
    for expected, found, step in zip(*(cache.read_blocks(0, table) for cache in caches), steps, strict=True):
        exact = expected[0, :, :100].to(torch.float32)
        off = (found[0, :, :100] - exact).abs() - exact.abs() * 2**-8
        assert bool((off <= HALF_STEP * step[:, :100, None]).all())
        assert bool((step[:, :100] <= exact.abs().amax(-1) / 127 * (1 + 2**-7)).all())
