"""Losses of passages and of assistants' tokens, and how two models are compared on them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from quant.progress import SilentProgress
from serving.model.chat_format import ChatMessage
from tests.training.evaluate.test_player import reference_logprobs
from training.data.records import Conversation
from training.evaluate.perplexity import (
    Loss,
    bits_per_byte,
    conversation_losses,
    increase_percent,
    passage_losses,
    perplexity,
    split_passages,
)
from training.evaluate.player import Player

pytestmark = pytest.mark.unit

CONVERSATION = Conversation(
    (
        ChatMessage("user", "Hello, how are you?"),
        ChatMessage("assistant", "I am fine, thank you."),
        ChatMessage("user", "And the cat?"),
        ChatMessage("assistant", "It sat on the mat."),
    ),
    "test",
    "en",
)


def test_passages_hold_the_text_within_the_bound() -> None:
    text = "One line of text.\n" * 40 + "Eine sehr lange Zeile ohne Ende " * 20 + "\n" + "你好世界" * 60
    passages = split_passages(text, 100)
    assert max(len(passage.encode()) for passage in passages) <= 100
    assert "".join("".join(passages).split()) == "".join(text.split())


def test_a_blank_text_has_no_passages() -> None:
    assert split_passages(" \n\n", 100) == []


def test_a_passages_loss_is_that_of_its_ids(model: Path, player: Player) -> None:
    (loss,) = passage_losses(player, ["the cat sat on the mat"], SilentProgress(), "texts")
    ids = player.tokenizer.encode_prompt("the cat sat on the mat")
    assert loss is not None
    assert loss.nats == pytest.approx(-sum(reference_logprobs(model, ids)), abs=1e-3)
    assert (loss.tokens, loss.num_bytes) == (len(ids) - 1, 22)


def test_a_passage_that_does_not_fit_is_named_none_in_its_place(player: Player) -> None:
    losses = passage_losses(player, ["the cat", "word " * 2000, "the mat"], SilentProgress(), "texts")
    assert [loss is None for loss in losses] == [False, True, False]


def test_a_conversations_loss_covers_exactly_the_assistants_tokens(model: Path, player: Player) -> None:
    (loss,) = conversation_losses(player, [CONVERSATION], SilentProgress(), "conversations")
    ids, is_answer = player.chat().render_with_loss_mask(CONVERSATION.messages)
    scores = reference_logprobs(model, ids)
    expected = sum(score for score, counts in zip(scores, is_answer[1:], strict=True) if counts)
    assert loss is not None
    assert loss.nats == pytest.approx(-expected, abs=1e-3)
    assert loss.tokens == sum(is_answer)
    assert loss.num_bytes == len("I am fine, thank you.It sat on the mat.")


def test_perplexity_weighs_by_tokens() -> None:
    losses = [Loss(10.0, 10, 30), Loss(60.0, 20, 60)]
    assert perplexity(losses, seed=0).value == pytest.approx(math.exp(70 / 30))
    assert bits_per_byte(losses, seed=0).value == pytest.approx(70 / math.log(2) / 90)


def test_the_increase_is_the_ratio_of_perplexities_for_one_tokenizer() -> None:
    new, old = [Loss(11.0, 10, 30), Loss(42.0, 20, 60)], [Loss(10.0, 10, 30), Loss(40.0, 20, 60)]
    ratio = perplexity(new, seed=0).value / perplexity(old, seed=0).value
    assert increase_percent(new, old, seed=0).value == pytest.approx(100 * (ratio - 1))


def test_the_increase_does_not_depend_on_the_new_models_tokenizer() -> None:
    """The same nats in half as many tokens is the same quality, though perplexity per token is another."""
    old = [Loss(10.0, 10, 30), Loss(40.0, 20, 60)]
    assert increase_percent([Loss(10.0, 5, 30), Loss(40.0, 10, 60)], old, seed=0).value == pytest.approx(0)
