"""BLOOM and GPT-NeoX in the engine, against transformers' own logits and the plain decoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quant.errors import CheckpointError
from quant.formats.checkpoint_names import checkpoint_names
from quant.int4_linear import relative_error
from quant.native.library import load_library
from serving.engine.batch import build_batch
from serving.engine.engine import Engine
from serving.engine.kv_blocks import KVCache, KVLayout
from serving.engine.logits import serving_logits
from serving.engine.native_step import why_no_native_step
from serving.engine.prepare import PreparedModel, prepare
from serving.engine.requests import ScoreEvent, ScoreRequest
from serving.engine.runner import run_chunks
from serving.engine.scheduler import Chunk
from serving.engine.sequence import Sequence
from serving.model.spec import DecoderSpec
from serving.model.weights import load_decoder, read_config
from tests.serving.engine.engines import engine_of, generate, reused, run, tokens
from tests.serving.engine.tiny import BLOOM_SPEC, NEOX_SPEC, make_decoder, prompt_of, quantized_decoder
from tests.serving.model.checkpoints import build_model, random_ids, save_model

pytestmark = pytest.mark.unit

SPECS = {"bloom": BLOOM_SPEC, "gpt_neox": NEOX_SPEC}
# Heads and widths that the packed products take.
PACKED_SPECS = {
    "bloom": replace(BLOOM_SPEC, vocab_size=256, hidden_size=96, intermediate_size=192, head_dim=16),
    "gpt_neox": replace(NEOX_SPEC, vocab_size=256, hidden_size=64, intermediate_size=96, head_dim=32, rotary_dims=8),
}
each_family = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
each_packed_family = pytest.mark.parametrize("spec", PACKED_SPECS.values(), ids=PACKED_SPECS)


def exact_model(spec: DecoderSpec) -> PreparedModel:
    return prepare(make_decoder(spec), exact=True)


def greedy_ids(engine: Engine, prompts: list[list[int]], count: int) -> list[list[int]]:
    for index, prompt in enumerate(prompts):
        engine.submit(generate(str(index), prompt, count))
    events = run(engine)
    return [tokens(events, str(index)) for index in range(len(prompts))]


FAMILIES = ("palm", "cohere", "bloom", "bloom_eight_heads", "gpt_neox", "gpt_neox_sequential", "gpt_neox_unbiased")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("chunk_tokens", [256, 7, 1])
def test_prefill_and_decode_give_the_logits_of_transformers(name: str, chunk_tokens: int, tmp_path: Path) -> None:
    reference = build_model(name)
    save_model(reference, tmp_path)
    ids = random_ids(batch=1)[0]
    with torch.no_grad():
        expected = reference(ids.unsqueeze(0)).logits[0]

    found = serving_logits(prepare(load_decoder(tmp_path), exact=True), ids, chunk_tokens=chunk_tokens)

    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@each_family
def test_sequences_decoded_together_give_what_each_gives_alone(spec: DecoderSpec) -> None:
    """Contexts of several lengths: some are attended in padded groups, some by themselves."""
    prompts = [prompt_of(length, seed=length) for length in (3, 17, 20, 41, 90)]
    batched = replace(exact_model(spec), is_exact=False)
    together = greedy_ids(engine_of(model=batched, max_step_tokens=64), prompts, 20)
    alone = [greedy_ids(engine_of(model=exact_model(spec)), [prompt], 20)[0] for prompt in prompts]
    assert together == alone


@each_family
def test_rows_of_a_padded_group_attend_to_their_own_context_only(spec: DecoderSpec) -> None:
    """Decoding rows with two and three blocks in one group, against the plain decoder; block 0 holds another's keys."""
    decoder = make_decoder(spec)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(6.0 if parameter.dim() == 2 else 1.0)  # else attention hardly matters
    model, lengths = prepare(decoder, exact=True), (20, 33, 41)
    cache = KVCache(KVLayout.of(spec, model.dtype), 12)
    sequences = [sequence_of(prompt_of(length, seed=length), 4 * index) for index, length in enumerate(lengths)]
    with torch.inference_mode():
        run_chunks(model, cache, [Chunk(each, 0, len(each.ids) - 1) for each in sequences])
        last = [Chunk(each, len(each.ids) - 1, 1) for each in sequences]
        assert len(build_batch(last).decode_groups) == 1
        found = run_chunks(model, cache, last)
        for row, each in zip(model.head(found), sequences, strict=True):
            torch.testing.assert_close(row, decoder(torch.tensor([each.ids]))[0, -1], atol=1e-4, rtol=1e-4)


def sequence_of(ids: list[int], first_block: int) -> Sequence:
    """With its blocks in descending order, so that they are no run."""
    blocks = [first_block + 3 - index for index in range(3)]
    return Sequence(ScoreRequest(request_id=str(first_block), ids=ids), first_block, 0, ids, len(ids), blocks=blocks)


def random_lora(reference: nn.Module, ends: tuple[str, ...]) -> dict[str, Tensor]:
    """By the modules' names in transformers, of rank 3, the scale in B."""
    torch.manual_seed(5)
    tensors: dict[str, Tensor] = {}
    for name, module in reference.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(ends):
            tensors[f"{name}.lora_A.weight"] = torch.randn(3, module.in_features) * 0.3
            tensors[f"{name}.lora_B.weight"] = torch.randn(module.out_features, 3) * 0.3
    return tensors


@pytest.mark.parametrize("name", ["bloom", "gpt_neox", "palm"])
def test_an_adapter_by_the_checkpoints_names_gives_the_logits_of_the_merged_model(name: str, tmp_path: Path) -> None:
    reference, ids = build_model(name), random_ids(batch=1)[0].tolist()
    save_model(reference, tmp_path)
    tensors = random_lora(reference, ("query_key_value", ".dense", "h_to_4h", "q_proj", "v_proj"))
    names = checkpoint_names(read_config(tmp_path))
    model = prepare(load_decoder(tmp_path), exact=True)
    engine = Engine(model, kv_bytes=1 << 20, tokenizer=None, names=names)
    engine.set_adapter("tuned", tensors, version=1)
    engine.submit(ScoreRequest(request_id="tuned", ids=ids, adapter="tuned"))
    (event,) = [event for event in run(engine) if isinstance(event, ScoreEvent)]

    with torch.no_grad():
        for module in {key.rpartition(".lora_")[0] for key in tensors}:
            delta = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
            reference.get_submodule(module).weight.add_(delta)  # type: ignore[operator]
        logprobs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(logprobs[place, ids[place + 1]]) for place in range(len(ids) - 1)]
    assert [found.logprob for found in event.logprobs] == pytest.approx(expected, abs=1e-3)


def test_a_pair_that_cannot_be_split_is_refused_by_its_name(tmp_path: Path) -> None:
    save_model(build_model("bloom"), tmp_path)
    names = checkpoint_names(read_config(tmp_path))
    engine = Engine(prepare(load_decoder(tmp_path), exact=True), kv_bytes=1 << 20, tokenizer=None, names=names)
    module = "transformer.h.0.self_attention.query_key_value"
    tensors = {f"{module}.lora_A.weight": torch.zeros(2, 48), f"{module}.lora_B.weight": torch.zeros(47, 2)}
    with pytest.raises(CheckpointError, match=rf"adapter 'odd': {module}: a fused linear has 47 rows"):
        engine.set_adapter("odd", tensors, version=1)


@each_family
def test_a_beginning_that_was_found_gives_the_same_tokens(spec: DecoderSpec) -> None:
    engine, prompt = engine_of(model=exact_model(spec)), prompt_of(50)
    first = greedy_ids(engine, [prompt], 12)
    engine.submit(generate("again", prompt))
    events = run(engine)
    assert reused(events, "again") == 48
    assert tokens(events, "again") == first[0]


@each_family
def test_checked_guesses_give_the_same_tokens(spec: DecoderSpec) -> None:
    prompt = prompt_of(9) * 4
    plain = greedy_ids(engine_of(model=exact_model(spec)), [prompt], 30)
    assert greedy_ids(engine_of(model=exact_model(spec), prompt_lookup=True), [prompt], 30) == plain


@each_family
def test_the_fast_path_differs_from_the_plain_one_by_rounding_only(spec: DecoderSpec) -> None:
    decoder, ids = make_decoder(spec), torch.tensor(prompt_of(200))
    with torch.no_grad():
        expected = decoder(ids.unsqueeze(0))[0]
        for chunk_tokens in (256, 1):
            found = serving_logits(prepare(decoder, exact=False), ids, chunk_tokens=chunk_tokens)
            assert relative_error(found, expected) < 0.02
        decoder.model.layers[1].mlp.up_proj.bias.add_(0.5)  # type: ignore[union-attr]
        assert relative_error(serving_logits(prepare(decoder, exact=False), ids), expected) > 0.04


@each_packed_family
def test_a_quantised_model_is_served_as_its_plain_twin_computes_it(spec: DecoderSpec) -> None:
    decoder, ids = quantized_decoder(spec, bits=4), torch.tensor(prompt_of(24))
    with torch.no_grad():
        expected = decoder(ids.unsqueeze(0))[0]
    for chunk_tokens in (256, 1):
        found = serving_logits(prepare(decoder, exact=False), ids, chunk_tokens=chunk_tokens)
        assert relative_error(found, expected) < 0.03


@each_packed_family
def test_an_int8_cache_costs_little(spec: DecoderSpec) -> None:
    model, ids = exact_model(spec), torch.tensor(prompt_of(60))
    found = serving_logits(model, ids, chunk_tokens=16, int8_kv=True)
    assert relative_error(found, serving_logits(model, ids)) < 0.03


@pytest.mark.skipif(load_library() is None, reason="no native kernels on this machine")
@each_packed_family
def test_the_native_step_leaves_these_forms_to_the_torch_step(spec: DecoderSpec) -> None:
    model = prepare(quantized_decoder(spec), exact=False)
    assert model.native is None
    assert str(why_no_native_step(spec, model.layers)).startswith("form_")


@pytest.mark.parametrize("change", [{"rotary_dims": 4}, {"mlp_bias": True}, {"embedding_norm": True}])
def test_the_native_step_refuses_one_changed_part_of_its_form(change: dict[str, int]) -> None:
    spec = replace(make_decoder().spec, **change)  # pyright: ignore[reportArgumentType]
    assert next(iter(change)).replace("rotary_dims", "turned") in str(why_no_native_step(spec, ()))
