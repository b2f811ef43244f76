from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from serving.model.chat_format import ChatMessage
from tests.training.rl_world import World, make_ppo, write_conversations, write_prompts, write_texts, write_world
from training.batches import pad_rows
from training.data.load import LoadPolicy
from training.data.records import Conversation, Document
from training.errors import DataError, TrainingError
from training.loop import accumulate
from training.prompts import read_prompts, require_chat_format
from training.ptx import PtxObjective, conversation_samples, read_mixture, text_samples
from training.settings import PpoSettings

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


def mixed(world: World, folder: Path, **changes: object) -> PpoSettings:
    return world.ppo_settings(
        folder / "out",
        ptx="mixture",
        ptx_text=(write_texts(folder / "texts.jsonl"),),
        ptx_conversations=(write_conversations(folder / "conversations.jsonl"),),
        ptx_length=64,
        **changes,
    )


def test_texts_are_cut_and_every_token_is_learned(world: World, tmp_path: Path) -> None:
    _, models = make_ppo(world.ppo_settings(tmp_path / "out"))
    tokenizer = models.trunk.tokenizer
    text = "the cat sat on the mat and the other cat sat on the other mat " * 3
    samples = text_samples([Document(text, "test", "en")], tokenizer, 16)
    ids = [token for sample in samples for token in sample.ids]
    assert ids == tokenizer.encode_prompt(text)[: len(ids)]
    assert all(len(sample.ids) <= 16 and all(sample.is_target) for sample in samples)


def test_conversations_are_learned_on_the_assistants_tokens(world: World, tmp_path: Path) -> None:
    _, models = make_ppo(world.ppo_settings(tmp_path / "out"))
    chat_format = require_chat_format(models.trunk)
    messages = (ChatMessage("user", "hello"), ChatMessage("assistant", "thank you"))
    [sample] = conversation_samples([Conversation(messages, "test", "en")], chat_format, 64)
    learned = [token for token, is_target in zip(sample.ids, sample.is_target, strict=True) if is_target]
    assert models.trunk.tokenizer.decode(learned) == "thank you"
    with pytest.raises(DataError, match="ptx-length"):
        conversation_samples([Conversation(messages, "test", "en")], chat_format, 8)


def test_the_mixture_keeps_its_shares_and_follows_the_step(world: World, tmp_path: Path) -> None:
    settings = mixed(world, tmp_path, ptx_batch_size=8, ptx_text_share=0.25)
    _, models = make_ppo(settings)
    mixture = read_mixture(settings, models.trunk, LoadPolicy())
    assert mixture is not None
    rows = mixture.of_step(3, seed=0)
    assert len(rows) == 8
    assert sum(row in mixture.texts for row in rows) == 2
    assert mixture.of_step(3, seed=0) == rows
    assert mixture.of_step(4, seed=0) != rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ptx_text": ()}, "--ptx-text, which names no file"),
        ({"ptx_text_share": 1.0}, "--ptx-conversations has no effect"),
        ({"ptx_coefficient": 0.0}, "no effect with --ptx-coefficient 0"),
    ],
)
def test_parts_without_effect_are_refused(
    world: World, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    _, models = make_ppo(world.ppo_settings(tmp_path / "out"))
    settings = replace(mixed(world, tmp_path), **changes)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=message):
        read_mixture(settings, models.trunk, LoadPolicy())


def test_the_term_is_the_coefficient_times_the_mean_cross_entropy_at_temperature_1(
    world: World, tmp_path: Path
) -> None:
    """Twice the coefficient, twice the gradient; the size of passes changes nothing."""
    settings = mixed(world, tmp_path, ptx_coefficient=0.5)
    _, models = make_ppo(settings)
    mixture = read_mixture(settings, models.trunk, LoadPolicy())
    assert mixture is not None
    parameters = models.policy.body.parameters()
    gradients: list[torch.Tensor] = []
    losses: list[float] = []
    for changed in (settings, replace(settings, ptx_coefficient=1.0, micro_batch_size=3)):
        objective = PtxObjective(replace(models.policy, temperature=1.0), mixture, changed)
        values = accumulate(objective, objective.micro_batches(0)).values
        losses.append(values["ptx_loss"])
        assert values["loss"] == pytest.approx(changed.ptx_coefficient * values["ptx_loss"])
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        for parameter in parameters:
            parameter.grad = None
    batch = pad_rows(mixture.of_step(0, settings.seed))
    mean = -float(replace(models.policy, temperature=1.0).logprobs(batch).detach().mean())
    assert losses == [pytest.approx(mean, rel=1e-5)] * 2
    torch.testing.assert_close(gradients[1], 2 * gradients[0], rtol=1e-4, atol=1e-7)


def test_prompts_that_are_too_long_are_left_out_and_counted(world: World, tmp_path: Path) -> None:
    _, models = make_ppo(world.ppo_settings(tmp_path / "out"))
    chat_format = require_chat_format(models.trunk)
    path = write_prompts(tmp_path / "prompts.jsonl", ("hi", "the quick brown fox jumps over the lazy dog " * 5))
    lengths = [
        len(chat_format.render(row.messages))
        for row in read_prompts((path,), LoadPolicy(), chat_format, max_tokens=500).prompts
    ]
    kept = read_prompts((path,), LoadPolicy(), chat_format, max_tokens=min(lengths))
    assert [prompt.messages[0].content for prompt in kept.prompts] == ["hi"]
    assert kept.num_too_long == 1
    assert list(kept.ids[0]) == chat_format.render(kept.prompts[0].messages)
    with pytest.raises(DataError, match="max-prompt-tokens"):
        read_prompts((path,), LoadPolicy(), chat_format, max_tokens=2)
