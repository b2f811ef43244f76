"""Our own tokenizer: exactly as large as asked, any text comes back, and its chat format can be learned from."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.model.chat_format import ChatFormat, ChatMessage
from serving.model.tokenizer import ModelTokenizer
from tests.training.tiny_directory import TEXTS
from training.errors import TrainingError
from training.tokenizer import SPECIAL_TOKENS, train_tokenizer, write_tokenizer

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(train_tokenizer(TEXTS, 270), path)
    return path


def test_special_tokens_come_first_and_never_from_text(directory: Path) -> None:
    tokenizer = ModelTokenizer.load(directory)
    assert [token.text for token in tokenizer.added_tokens] == list(SPECIAL_TOKENS)
    assert not set(tokenizer.encode("<|im_end|><|endoftext|>")) & tokenizer.special_ids


def test_a_generation_ends_at_the_end_of_a_turn_or_of_a_text(directory: Path) -> None:
    tokenizer = ModelTokenizer.load(directory)
    ends = {token.token_id for token in tokenizer.added_tokens if token.text in ("<|im_end|>", "<|endoftext|>")}
    assert tokenizer.eos_ids == ends


@given(st.text(max_size=40))
def test_any_text_comes_back(text: str) -> None:
    tokenizer = train_tokenizer(TEXTS, 262)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_digits_stand_alone(directory: Path) -> None:
    assert len(ModelTokenizer.load(directory).encode("2026")) == 4


def test_the_chat_format_marks_answers(directory: Path) -> None:
    tokenizer = ModelTokenizer.load(directory)
    messages = [ChatMessage("system", "Be kind."), ChatMessage("user", "Hello"), ChatMessage("assistant", "Good day.")]
    ids, is_answer = ChatFormat.load(directory, tokenizer).render_with_loss_mask(messages)
    answer = [token for token, marked in zip(ids, is_answer, strict=True) if marked]
    assert tokenizer.decode(answer, skip_special=False) == "Good day.<|im_end|>"


def test_a_size_that_cannot_be_reached_is_refused() -> None:
    with pytest.raises(TrainingError, match="at least 260"):
        train_tokenizer(TEXTS, 259)
    with pytest.raises(TrainingError, match=r"yields only .* of 5,000 tokens"):
        train_tokenizer(TEXTS, 5000)
