from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant.formats.checkpoint_names import checkpoint_names
from serving.model.spec import Norm, Positions, spec_from_config
from serving.model.transformer import Decoder
from serving.model.weights import load_decoder
from tests.serving.model.checkpoints import MODELS, build_model, random_ids, save_model

pytestmark = pytest.mark.unit

TOLERANCE = 1e-4


def reference_and_decoder(name: str, directory: Path) -> tuple[torch.nn.Module, Decoder]:
    model = build_model(name)
    save_model(model, directory)
    return model, load_decoder(directory)


def largest_difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    model, decoder = reference_and_decoder(name, tmp_path)
    ids = random_ids(length=min(100, decoder.spec.max_positions))

    with torch.no_grad():
        expected = model(ids).logits
        found = decoder(ids)

    assert expected.std() > 0.5
    assert largest_difference(found, expected) < TOLERANCE


@pytest.mark.parametrize("part", ["q_proj.weight", "k_proj.bias", "k_norm.weight", "o_proj.bias", "gate_proj.weight"])
def test_the_tolerance_notices_a_slightly_wrong_parameter(part: str, tmp_path: Path) -> None:
    model, decoder = reference_and_decoder("qwen3_biased", tmp_path)
    name = next(name for name, _ in decoder.named_parameters() if name.endswith(part))
    ids = random_ids()

    with torch.no_grad():
        decoder.get_parameter(name).flatten()[0] += 0.1
        difference = largest_difference(decoder(ids), model(ids).logits)

    assert difference > TOLERANCE


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("norm", Norm.RMS),
        ("positions", Positions.ROTARY_HALVES),
        ("logit_scale", 1.0),
        ("rope_theta", 1e4),
        ("norm_eps", 1e-2),
    ],
)
def test_every_field_that_makes_a_palm_model_changes_its_logits(field: str, other: object, tmp_path: Path) -> None:
    model, decoder = reference_and_decoder("palm", tmp_path)
    changed = Decoder(replace(decoder.spec, **{field: other}))
    changed.load_state_dict(decoder.state_dict())
    ids = random_ids()
    with torch.no_grad():
        assert largest_difference(changed(ids), model(ids).logits) > TOLERANCE


def test_scaled_rope_differs_from_plain_rope_within_the_test_length(tmp_path: Path) -> None:
    _, decoder = reference_and_decoder("llama_scaled_rope", tmp_path)
    ids = random_ids(length=100)
    with torch.no_grad():
        scaled = decoder(ids)
        decoder.spec = replace(decoder.spec, rope_scaling=None)
        plain = decoder(ids)
    assert largest_difference(scaled, plain) > 100 * TOLERANCE


def test_explicit_positions_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    model, decoder = reference_and_decoder("llama", tmp_path)
    ids = random_ids(length=20)
    positions = torch.arange(20) * 3 + 7

    with torch.no_grad():
        expected = model(ids, position_ids=positions.expand(2, -1), attention_mask=torch.ones_like(ids)).logits
        found = decoder(ids, positions)

    assert largest_difference(found, expected) < TOLERANCE


@pytest.mark.parametrize("name", ["qwen3", "palm"])
def test_gradients_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    model, decoder = reference_and_decoder(name, tmp_path)
    ids = random_ids(length=12)

    for network, logits in ((model, model(ids).logits), (decoder, decoder(ids))):
        network.zero_grad()
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()

    expected = dict(model.named_parameters())
    assert expected.keys() == dict(decoder.named_parameters()).keys()
    for name, parameter in decoder.named_parameters():
        found, wanted = parameter.grad, expected[name].grad
        assert found is not None, name
        assert wanted is not None, name
        assert largest_difference(found, wanted) < TOLERANCE, name


def test_parameter_names_follow_from_hugging_faces() -> None:
    for name in MODELS:
        model = build_model(name)
        spec_source = model.config.to_dict()
        spec_source["architectures"] = [type(model).__name__]
        decoder = Decoder(spec_from_config(spec_source), device="meta")
        ours = checkpoint_names(spec_source).split_tensors(model.state_dict()).keys()
        tied = {"lm_head.weight"} if decoder.lm_head is None else set[str]()
        assert dict(decoder.named_parameters()).keys() == ours - tied, name


def test_rotary_tables_stay_exact_in_a_bfloat16_decoder(tmp_path: Path) -> None:
    _, decoder = reference_and_decoder("llama", tmp_path)
    positions = torch.tensor([0, 5, 200])
    expected, _ = decoder.rotary(positions)

    found, _ = decoder.to(torch.bfloat16).rotary(positions)

    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
