from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from quant.errors import CheckpointError
from serving.model.tokenizer import ModelTokenizer
from tests.serving.model.tiny_tokenizers import FAMILIES, write_tokenizer

pytestmark = pytest.mark.unit

TEXTS = [
    "Hello world, how are you?",
    "  two leading spaces and a trailing one ",
    "naïve café 你好 🙂 \u200b",
    "line\n\n\tindented\r\n",
    "",
    "x",
    "\x00\x7f\ufffd",
]


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(str(request.param))
    write_tokenizer(str(request.param), path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> ModelTokenizer:
    return ModelTokenizer.load(directory)


@pytest.fixture(scope="module")
def reference(directory: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_encoded_as_by_transformers(
    text: str, tokenizer: ModelTokenizer, reference: PreTrainedTokenizerFast
) -> None:
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)
    assert tokenizer.encode_prompt(text) == reference.encode(text)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_decoded_as_by_transformers(
    text: str, tokenizer: ModelTokenizer, reference: PreTrainedTokenizerFast
) -> None:
    ids = [*tokenizer.encode(text), *sorted(tokenizer.special_ids)]
    for skip in (True, False):
        expected = reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids, skip_special=skip) == expected


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_bytes_of_tokens_joined_are_the_text(tokenizer: ModelTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    joined = b"".join(tokenizer.token_bytes[token_id] for token_id in ids).decode(errors="replace")
    if tokenizer.strips_leading_space:
        joined = joined.removeprefix(" ")
    assert joined == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data())
def test_bytes_of_any_tokens_joined_are_what_decoding_gives(tokenizer: ModelTokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    joined = b"".join(tokenizer.token_bytes[token_id] for token_id in ids).decode(errors="replace")
    if tokenizer.strips_leading_space:
        joined = joined.removeprefix(" ")
        # For sentencepiece the library gives up a whole run of byte tokens if any of them is wrong.
        assume("\ufffd" not in joined)
    # The library and Python differ in how many U+FFFD stand for one unfinished character.
    assert joined.replace("\ufffd", "") == tokenizer.decode(ids).replace("\ufffd", "")


def test_special_tokens_in_text_are_text(tokenizer: ModelTokenizer) -> None:
    for token in tokenizer.added_tokens:
        if token.is_special:
            for text in (token.text, f"a{token.text}b", f" {token.text}\n"):
                ids = tokenizer.encode(text)
                assert tokenizer.special_ids.isdisjoint(ids)
                assert tokenizer.decode(ids).lstrip() == text.lstrip()


def test_a_special_token_that_merges_could_spell_stays_text(tmp_path: Path) -> None:
    write_tokenizer("llama2", tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    for piece in ("<", ">", "/", "s", "<s"):
        vocabulary.setdefault(piece, len(vocabulary))
    definition["model"]["merges"] += [["<", "s"], ["<s", ">"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))

    tokenizer = ModelTokenizer.load(tmp_path)

    assert tokenizer.bos_id == 1
    assert 1 not in tokenizer.encode("a<s>b")
    assert "<s>" in tokenizer.decode(tokenizer.encode("a<s>b"), skip_special=False).replace(" ", "")


def test_an_unknown_character_becomes_the_unknown_token(tmp_path: Path) -> None:
    write_tokenizer("llama2", tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    definition["model"]["byte_fallback"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    assert 0 in ModelTokenizer.load(tmp_path).encode("🙂")


def test_lone_surrogates_are_replaced(tokenizer: ModelTokenizer) -> None:
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")


def test_end_ids_come_from_generation_config_and_tokenizer(tmp_path: Path) -> None:
    for name, expected in (
        ("smollm2", {"<|im_end|>"}),
        ("llama3", {"<|end_of_text|>", "<|eot_id|>"}),
        ("qwen3", {"<|im_end|>", "<|endoftext|>"}),
    ):
        write_tokenizer(name, tmp_path)
        tokenizer = ModelTokenizer.load(tmp_path)
        assert {tokenizer.token_text(token_id) for token_id in tokenizer.eos_ids} == expected
        assert tokenizer.eos_ids <= tokenizer.special_ids


def test_without_generation_config_the_models_own_end_ids_count(tmp_path: Path) -> None:
    write_tokenizer("smollm2", tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    assert ModelTokenizer.load(tmp_path).eos_ids == {0, 2}


def test_ids_of_a_padded_vocabulary_have_no_bytes(tmp_path: Path) -> None:
    write_tokenizer("smollm2", tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 640}')
    tokenizer = ModelTokenizer.load(tmp_path)
    assert tokenizer.vocab_size == len(tokenizer.token_bytes) == 640
    assert tokenizer.token_bytes[639] == b""
    assert tokenizer.token_text(639) == ""
    assert tokenizer.decode([639]) == ""


def test_stored_truncation_is_not_applied(tmp_path: Path) -> None:
    write_tokenizer("smollm2", tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    definition["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    assert len(ModelTokenizer.load(tmp_path).encode("a b c d e f")) > 2


def test_directories_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        ModelTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ModelTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Nonsense"}}')
    with pytest.raises(CheckpointError, match="cannot be used"):
        ModelTokenizer.load(tmp_path)
    write_tokenizer("smollm2", tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    definition["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(CheckpointError, match="decoder WordPiece is not supported"):
        ModelTokenizer.load(tmp_path)
