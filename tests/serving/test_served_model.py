from __future__ import annotations

import json
from pathlib import Path

import pytest

from quant.errors import CheckpointError
from quant.model_directory import Manifest, write_manifest
from serving.model.tokenizer import ModelTokenizer
from serving.served_model import load_texts, model_id_of
from tests.serving.model.tiny_tokenizers import write_tokenizer

pytestmark = pytest.mark.unit


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_tokenizer("smollm2", tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    return tmp_path


def test_a_directory_gives_tokenizer_chat_format_and_defaults(directory: Path) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"temperature": 0.2, "top_k": 40}), encoding="utf-8")
    model = load_texts(directory).served_as("tiny", 512)
    assert isinstance(model.tokenizer, ModelTokenizer)
    assert model.chat_format is not None
    assert (model.defaults.temperature, model.defaults.top_k, model.defaults.top_p) == (0.2, 40, None)
    assert (model.model_id, model.max_context) == ("tiny", 512)


def test_weights_trained_with_another_template_are_refused_with_both_hashes(directory: Path) -> None:
    write_manifest(directory, Manifest(stage="sft", chat_format_sha256="0" * 64))
    with pytest.raises(CheckpointError, match="is not the one its weights were trained with"):
        load_texts(directory)


def test_the_template_they_were_trained_with_is_accepted(directory: Path) -> None:
    chat_format = load_texts(directory).chat_format
    assert chat_format is not None
    write_manifest(directory, Manifest(stage="sft", chat_format_sha256=chat_format.sha256))
    assert load_texts(directory).chat_format is not None


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_unusable_sampling_defaults_are_an_error_not_ignored(directory: Path, text: str) -> None:
    (directory / "generation_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load_texts(directory)


def test_clients_call_a_model_by_the_name_its_user_gave(tmp_path: Path) -> None:
    assert model_id_of("smollm2-135m-instruct") == "smollm2-135m-instruct"
    assert model_id_of("HuggingFaceTB/SmolLM2-135M-Instruct") == "smollm2-135m-instruct"
    assert model_id_of("owner/other-model") == "owner/other-model"
    (tmp_path / "mine").mkdir()
    assert model_id_of(str(tmp_path / "mine")) == "mine"
