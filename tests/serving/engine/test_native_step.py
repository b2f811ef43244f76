"""The native decode step against the torch path and the plain decoder. Runs again on the other code paths."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant.int4_linear import relative_error
from quant.native.library import load_library
from quant.native.linear import NativeLinear
from quant.native.packing import CMatrix
from serving.engine import native_step
from serving.engine.engine import Engine, EngineLimits
from serving.engine.kv_blocks import KVCache, KVLayout, blocks_for
from serving.engine.logits import serving_logits
from serving.engine.prepare import PreparedModel, prepare, prepare_live
from serving.engine.requests import GenerateRequest, SamplingParams, ScoreRequest, TokenEvent
from serving.engine.runner import run_chunks
from serving.engine.scheduler import Chunk
from serving.engine.sequence import Sequence
from serving.model.spec import DecoderSpec
from serving.model.transformer import Decoder
from tests.serving.engine.tiny import NATIVE_SPEC, PALM_SPEC, SPEC, make_decoder, prompt_of, quantized_decoder

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(load_library() is None, reason="no native kernels on this machine"),
]

FORMS = {
    "every option": NATIVE_SPEC,
    "plain, head of 64": replace(
        NATIVE_SPEC, qk_norm=False, qkv_bias=False, out_bias=False, num_heads=3, num_kv_heads=3, head_dim=64
    ),
    "five query heads a key head, head of 128": replace(NATIVE_SPEC, num_heads=5, num_kv_heads=1, head_dim=128),
    "head of 96, tied": replace(NATIVE_SPEC, num_heads=4, num_kv_heads=2, head_dim=96, tied_embeddings=True),
}
# int8 activations, and bf16 ones on the other side. A product is 0.7 % off; what follows adds to it.
TOLERANCE = 0.03
both_caches = pytest.mark.parametrize("int8_kv", [False, True], ids=["bfloat16 cache", "int8 cache"])


def without_native_step(model: PreparedModel) -> PreparedModel:
    return replace(model, native=None)


def make_engine(model: PreparedModel, *, int8_kv: bool = False) -> Engine:
    return Engine(model, kv_bytes=1 << 21, tokenizer=None, limits=EngineLimits(max_step_tokens=24), int8_kv=int8_kv)


def greedy_ids(engine: Engine, prompts: list[list[int]], count: int) -> list[list[int]]:
    for index, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=count, temperature=0, seed=0)
        engine.submit(GenerateRequest(request_id=str(index), prompt_ids=prompt, sampling=sampling))
    found: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for event in engine.step().events:
            assert isinstance(event, TokenEvent)
            found[int(event.request_id)] += event.token_ids
    return found


@pytest.mark.parametrize("spec", FORMS.values(), ids=FORMS.keys())
def test_step_on_an_int8_cache_equals_its_torch_twin_within_the_tolerance(spec: DecoderSpec) -> None:
    model, ids = prepare(quantized_decoder(spec), exact=False), torch.tensor(prompt_of(300))
    expected = serving_logits(without_native_step(model), ids, int8_kv=True)
    assert relative_error(serving_logits(model, ids, chunk_tokens=50, int8_kv=True), expected) < TOLERANCE


@pytest.mark.parametrize("spec", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("bits", [4, 8])
def test_step_equals_the_plain_decoder_within_the_tolerance(spec: DecoderSpec, bits: int) -> None:
    decoder, ids = quantized_decoder(spec, bits=bits), torch.tensor(prompt_of(300))
    model = prepare(decoder, exact=False)
    assert model.native is not None
    with torch.no_grad():
        expected = decoder(ids.unsqueeze(0))[0]
    assert relative_error(serving_logits(model, ids, chunk_tokens=50), expected) < TOLERANCE


@pytest.mark.parametrize("name", ["qkv", "out", "gate_up", "down"])
def test_tolerance_notices_a_wrong_scale(name: str) -> None:
    model, ids = prepare(quantized_decoder(NATIVE_SPEC), exact=False), torch.tensor(prompt_of(40))
    expected = serving_logits(without_native_step(model), ids)
    assert relative_error(serving_logits(model, ids, chunk_tokens=1), expected) < TOLERANCE
    kernel = getattr(model.layers[1], name).kernel
    assert isinstance(kernel, NativeLinear)
    with torch.inference_mode():
        kernel._scales.mul_(1.2)
    assert relative_error(serving_logits(model, ids, chunk_tokens=1), expected) > TOLERANCE


@both_caches
def test_rows_are_the_same_alone_and_together(*, int8_kv: bool) -> None:
    model, ids = prepare(quantized_decoder(NATIVE_SPEC), exact=False), torch.tensor(prompt_of(70))
    alone = serving_logits(model, ids, chunk_tokens=1, int8_kv=int8_kv)
    for chunk_tokens in (2, 7, 64):
        assert torch.equal(serving_logits(model, ids, chunk_tokens=chunk_tokens, int8_kv=int8_kv), alone)


@both_caches
@pytest.mark.parametrize("spec", FORMS.values(), ids=FORMS.keys())
def test_rows_over_a_long_context_are_the_same_alone_and_in_tiles_of_any_height(
    spec: DecoderSpec, *, int8_kv: bool
) -> None:
    """Longer than two chunks of attention; one row, few rows (split by chunks) and many take different ways."""
    model, ids = prepare(quantized_decoder(spec), exact=False), torch.tensor(prompt_of(290))
    alone = serving_logits(model, ids, chunk_tokens=1, int8_kv=int8_kv)
    for chunk_tokens in (3, 8, 9, 50, 290):
        assert torch.equal(serving_logits(model, ids, chunk_tokens=chunk_tokens, int8_kv=int8_kv), alone)


@both_caches
def test_sequences_decoded_together_equal_each_alone(*, int8_kv: bool) -> None:
    model = prepare(quantized_decoder(NATIVE_SPEC), exact=False)
    prompts = [prompt_of(5 + 9 * i, seed=i) for i in range(6)]
    together = greedy_ids(make_engine(model, int8_kv=int8_kv), prompts, 30)
    assert together == [greedy_ids(make_engine(model, int8_kv=int8_kv), [prompt], 30)[0] for prompt in prompts]


@both_caches
@pytest.mark.parametrize("is_native_first", [True, False])
def test_both_paths_read_what_the_other_one_cached(is_native_first: bool, *, int8_kv: bool) -> None:
    decoder = quantized_decoder(NATIVE_SPEC)
    model, ids = prepare(decoder, exact=False), prompt_of(100)
    with torch.no_grad():
        expected = decoder(torch.tensor([ids]))[0, 70:]
    cache = KVCache(KVLayout.of(model.spec, model.dtype, is_int8=int8_kv), 9)
    sequence = Sequence(ScoreRequest(request_id="a", ids=ids), 0, 0, ids, len(ids), blocks=[8, 1, 2, 3, 7, 6, 0])
    first, second = (model, without_native_step(model)) if is_native_first else (without_native_step(model), model)
    with torch.inference_mode():
        run_chunks(first, cache, [Chunk(sequence, 0, 70)])
        found = model.head(run_chunks(second, cache, [Chunk(sequence, 70, 30)]))
        assert relative_error(found, expected) < TOLERANCE
        if cache._scales is not None:
            cache._scales[:, :, 0] *= 1.5  # of keys: the tolerance notices
            found = model.head(run_chunks(second, cache, [Chunk(sequence, 70, 30)]))
            assert relative_error(found, expected) > TOLERANCE


def logits_over(cache: KVCache, model: PreparedModel, ids: list[int], chunk_tokens: int, first_block: int) -> Tensor:
    """Logits (tokens, vocabulary) of `ids`, kept in the blocks from `first_block` on."""
    blocks = list(range(first_block, first_block + blocks_for(len(ids))))
    sequence = Sequence(ScoreRequest(request_id="a", ids=ids), first_block, 0, ids, len(ids), blocks=blocks)
    starts = range(0, len(ids), chunk_tokens)
    with torch.inference_mode():
        return torch.cat(
            [
                model.head(run_chunks(model, cache, [Chunk(sequence, start, min(chunk_tokens, len(ids) - start))]))
                for start in starts
            ]
        )


@both_caches
@pytest.mark.parametrize("spec", FORMS.values(), ids=FORMS.keys())
def test_slots_behind_a_context_may_hold_what_is_no_number(spec: DecoderSpec, *, int8_kv: bool) -> None:
    """One row (packed in parts), few rows (split by chunks) and many, each ending within a block and within a pair."""
    model = prepare(quantized_decoder(spec), exact=False)
    assert model.native is not None
    layout = KVLayout.of(model.spec, model.dtype, is_int8=int8_kv)
    for length, chunk_tokens in ((7, 1), (21, 5), (150, 50), (139, 139)):
        ids, blocks = prompt_of(length), blocks_for(length) + 2
        clean, poisoned = KVCache(layout, blocks), KVCache(layout, blocks)
        (poisoned._data if poisoned._scales is None else poisoned._scales).fill_(float("nan"))
        expected = logits_over(clean, model, ids, chunk_tokens, 1)
        assert torch.equal(logits_over(poisoned, model, ids, chunk_tokens, 1), expected), (length, chunk_tokens)


@pytest.mark.parametrize(
    ("decoder", "reason"),
    [
        (make_decoder(PALM_SPEC), "form_layer_parallel"),
        (make_decoder(SPEC), "head_dim_8"),
        (make_decoder(NATIVE_SPEC), "q_proj_is_not_packed"),
    ],
)
def test_other_models_keep_the_torch_path_and_say_why(
    decoder: Decoder, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="serving.engine.native_step")
    assert prepare(decoder, exact=False).native is None
    (record,) = caplog.records
    assert record.message.startswith("decode_step_chosen name=torch reason=")
    assert reason in record.message


def test_exact_live_and_unwilling_models_have_no_native_step() -> None:
    decoder = quantized_decoder(NATIVE_SPEC)
    for model in (
        prepare(decoder, exact=True),
        prepare(decoder, exact=False, native=False),
        prepare_live(decoder, torch.float32),
    ):
        assert model.native is None
        assert not any(isinstance(layer.qkv.kernel, NativeLinear) for layer in model.layers)


def test_rows_with_an_adapter_keep_the_torch_path() -> None:
    model = prepare(quantized_decoder(NATIVE_SPEC), exact=False)
    engine = make_engine(model)
    name = "model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 64), f"{name}.lora_B.weight": torch.ones(192, 2)}
    engine.set_adapter("a", tensors, version=1)
    sampling = SamplingParams(max_tokens=2, temperature=0, seed=0)
    for request_id, adapter in (("0", "a"), ("1", None)):
        engine.submit(
            GenerateRequest(request_id=request_id, prompt_ids=prompt_of(4), sampling=sampling, adapter=adapter)
        )
    assert model.native is not None
    assert [model.native.takes(chunk) for chunk in engine._scheduler.plan()] == [False, True]


def test_structs_mirror_the_native_ones() -> None:
    library = load_library()
    assert library is not None
    library.causerie_struct_size.restype = ctypes.c_int64
    mirrors = (CMatrix, native_step._CLayer, native_step._CModel, native_step._CBatch)
    assert [ctypes.sizeof(mirror) for mirror in mirrors] == [library.causerie_struct_size(i) for i in range(4)]


def identity_head(hidden: Tensor) -> Tensor:
    return hidden.to(torch.float32)


def hidden_states(model: PreparedModel, ids: Tensor) -> Tensor:
    return serving_logits(replace(model, head=identity_head), ids, chunk_tokens=1)


def test_bytes_of_the_weights_are_counted_where_all_of_them_are_native() -> None:
    decoder = quantized_decoder(NATIVE_SPEC)
    head_bytes = NATIVE_SPEC.vocab_size * NATIVE_SPEC.hidden_size
    counted = prepare(decoder, exact=False).weight_bytes()
    assert counted is not None
    linear_weights = sum(out * inputs for out, inputs in prepare(decoder, exact=True).linear_shapes().values())
    assert linear_weights / 2 + head_bytes < counted < 1.1 * (linear_weights + head_bytes)  # 4 or 8 bits, and scales
    assert prepare(decoder, exact=True).weight_bytes() is None


def test_head_reads_what_the_step_returns_and_nothing_is_scaled() -> None:
    model, ids = prepare(quantized_decoder(NATIVE_SPEC), exact=False), torch.tensor(prompt_of(30))
    expected = hidden_states(without_native_step(model), ids)
    assert relative_error(hidden_states(model, ids), expected) < TOLERANCE


# As on a processor without products of bf16 pairs.
WITHOUT_BF16 = """
import sys, pytest
from quant.native import library
flags = library._cpu_flags() - {"avx512_bf16"}
library._cpu_flags = lambda: flags
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="already running on a chosen capability")
@pytest.mark.parametrize("capability", ["avx512", "avx2"])
def test_these_and_the_products_pass_on_the_other_code_paths(capability: str) -> None:
    here = Path(__file__)
    files = (
        *(str(here), str(here.parent / "test_native_sharing.py"), str(here.parent / "test_int8_kv.py")),
        str(here.parents[2] / "quant" / "native" / "test_linear.py"),
        str(here.parents[2] / "quant" / "native" / "test_levels.py"),
    )
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_BF16, "-q", "-p", "no:cacheprovider", *files],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]
