"""PaLM models (Cohere) in the engine, against the plain decoder; test_families.py has the logits of transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from quant.int4_linear import QuantizedLinear, relative_error
from quant.method.gptq import GptqOptions, round_to_nearest
from serving.engine.engine import Engine, EngineLimits
from serving.engine.logits import serving_logits
from serving.engine.prepare import prepare
from serving.engine.requests import GenerateRequest, PoolEvent, PoolRequest, SamplingParams, TokenEvent
from serving.model.transformer import Decoder
from tests.serving.engine.tiny import PALM_SPEC, make_decoder, prompt_of

pytestmark = pytest.mark.unit

KV_BYTES = 1 << 20
# What causerie-tiny is made of, one layer of it.
SMALL_SPEC = replace(
    PALM_SPEC, vocab_size=4096, hidden_size=256, intermediate_size=1024, num_layers=1, num_heads=8, head_dim=32
)


def plain_logits(decoder: Decoder, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return decoder(ids.unsqueeze(0))[0]


def make_engine(decoder: Decoder, *, exact: bool = True, batched: bool = False) -> Engine:
    model = prepare(decoder, exact=exact)
    if batched:
        model = replace(model, is_exact=False)
    return Engine(model, kv_bytes=KV_BYTES, tokenizer=None, limits=EngineLimits(max_step_tokens=64))


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


def test_sequences_decoded_together_share_one_key_head_and_nothing_else() -> None:
    prompts = [prompt_of(17 + 3 * i, seed=i) for i in range(5)]
    together = greedy_ids(make_engine(make_decoder(PALM_SPEC), batched=True), prompts, 20)
    alone = [greedy_ids(make_engine(make_decoder(PALM_SPEC)), [prompt], 20)[0] for prompt in prompts]
    assert together == alone


def test_the_fast_path_differs_from_the_plain_one_by_rounding_only() -> None:
    decoder, ids = make_decoder(PALM_SPEC), torch.tensor(prompt_of(50))
    expected = plain_logits(decoder, ids)
    with torch.no_grad():
        assert relative_error(serving_logits(prepare(decoder, exact=False), ids), expected) < 0.02
        decoder.model.layers[1].mlp.up_proj.weight.mul_(1.5)  # type: ignore[union-attr]
        assert relative_error(serving_logits(prepare(decoder, exact=False), ids), expected) > 0.04


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_a_small_quantised_model_is_served_as_its_plain_twin_computes_it(group_size: int) -> None:
    """In prefill and token by token, where other kernels and the packed head are used."""
    decoder, ids = make_decoder(SMALL_SPEC), torch.tensor(prompt_of(24))
    for name, module in list(decoder.model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, attribute = name.rpartition(".")
            matrix = round_to_nearest(module.weight, GptqOptions(group_size=group_size, range_search=False))
            setattr(decoder.model.get_submodule(parent), attribute, QuantizedLinear(matrix))
    expected = plain_logits(decoder, ids)
    for chunk_tokens in (256, 1):
        found = serving_logits(prepare(decoder, exact=False), ids, chunk_tokens=chunk_tokens)
        assert relative_error(found, expected) < 0.02


def test_pool_reads_the_final_norm_and_not_the_scaled_logits() -> None:
    decoder, ids = make_decoder(PALM_SPEC), prompt_of(19)
    with torch.no_grad():
        cos, sin = decoder.rotary(torch.arange(len(ids)))
        hidden = decoder.embed(torch.tensor([ids]))
        for layer in decoder.layers:
            hidden = layer(hidden, cos, sin)
        expected = decoder.final_norm(hidden)[0, -1]
    engine = make_engine(decoder)
    head = torch.randn(1, PALM_SPEC.hidden_size, generator=torch.Generator().manual_seed(1))
    engine.set_head("reward", head)
    engine.submit(PoolRequest(request_id="r", ids=ids, head="reward"))
    (event,) = engine.step().events
    assert isinstance(event, PoolEvent)
    assert event.values == pytest.approx((head @ expected).tolist(), abs=1e-4)
