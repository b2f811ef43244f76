from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, CohereConfig, LlamaConfig

from training.errors import TrainingError
from training.sizes import SIZES, ModelSize, config_of, find_size

pytestmark = pytest.mark.unit

BUILDABLE = [size for size in SIZES.values() if size.gated and not size.biased]


@pytest.mark.parametrize("size", BUILDABLE, ids=lambda size: size.name)
def test_parameter_count_is_that_of_the_model_that_transformers_builds(size: ModelSize) -> None:
    config = config_of(size)
    kind = CohereConfig if config["model_type"] == "cohere" else LlamaConfig
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(kind.from_dict(config))
    assert sum(parameter.numel() for parameter in model.parameters()) == size.parameters


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("palm-8b", 8.63),  # arXiv:2204.02311, table 1
        ("palm-62b", 62.50),
        ("palm-540b", 540.35),
        ("llama-7b", 6.74),  # arXiv:2302.13971, table 2
        ("llama-13b", 13.02),
        ("bloom-176b", 176.25),  # arXiv:2211.05100, table 3
        ("gpt3-175b", 174.6),  # arXiv:2005.14165, table 2.1
        ("gpt2-1b5", 1.558),
        ("llama-135m", 0.1345),
    ],
)
def test_parameter_count_is_the_published_one(name: str, billions: float) -> None:
    assert find_size(name).parameters / 1e9 == pytest.approx(billions, rel=0.002)


@pytest.mark.parametrize(("name", "millions"), [("palm-2m", 2), ("palm-10m", 8.5), ("palm-50m", 45), ("palm-1b", 950)])
def test_small_sizes_are_about_what_their_names_say(name: str, millions: float) -> None:
    assert find_size(name).parameters / 1e6 == pytest.approx(millions, rel=0.1)


def test_no_embedding_is_set_aside_for_padding() -> None:
    config = CohereConfig.from_dict(config_of(find_size("palm-2m")))
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


def test_config_survives_transformers_unchanged(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("config")
    written = config_of(find_size("palm-540b"))
    CohereConfig.from_dict(written).save_pretrained(directory)
    read = AutoConfig.from_pretrained(directory)
    assert (read.head_dim, read.num_key_value_heads, read.logit_scale) == (256, 1, 18_432**-0.5)


def test_unknown_size_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(TrainingError, match="did you mean 'palm-8b'"):
        find_size("palm8b")


def test_size_for_planning_only_cannot_be_built() -> None:
    with pytest.raises(TrainingError, match="gpt3-175b is a size to plan with"):
        config_of(find_size("gpt3-175b"))
