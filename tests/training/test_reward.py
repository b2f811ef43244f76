"""Training a reward model: whole rankings in a batch, a known rule learned, reported, and resumed bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quant.model_directory import hash_directory, read_manifest
from serving.model.chat_format import ChatMessage
from tests.training.rl_world import write_model
from training.data.generated import Split, generate_rankings
from training.data.records import Ranking, encode_row
from training.errors import DataError, TrainingError
from training.loop import accumulate
from training.reward import (
    EncodedRanking,
    RewardBatch,
    RewardObjective,
    batch_of,
    encode_rankings,
    new_reward_model,
    run,
    split_by_prompt,
)
from training.reward_model import RewardModel
from training.settings import RewardSettings
from training.trunk import Compute, Trunk, load_trunk

pytestmark = pytest.mark.unit

COMPUTE = Compute(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def trunk_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("trunk") / "sft")


@pytest.fixture
def trunk(trunk_directory: Path) -> Trunk:
    return load_trunk(trunk_directory, COMPUTE, settings_for(trunk_directory, Path("unused"), Path("unused")))


def settings_for(model: Path, data: Path, out: Path, **changes: object) -> RewardSettings:
    values: dict[str, object] = {
        "model": model,
        "data": (data,),
        "out": out,
        "method": "full",
        "device": "cpu",
        "precision": "float32",
        "length": 96,
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 3e-3,
    }
    return RewardSettings(**{**values, **changes})  # pyright: ignore[reportArgumentType]


def write_rankings(path: Path, count: int, split: Split = "train") -> Path:
    rows = generate_rankings(split, count)
    path.write_bytes(b"".join(encode_row(row) + b"\n" for row in rows))
    return path


def ranking(*answers: str, question: str = "hello", ranks: tuple[int, ...] | None = None) -> Ranking:
    return Ranking((ChatMessage("user", question),), answers, ranks or tuple(range(1, len(answers) + 1)), "test")


def encoded(trunk: Trunk, *rankings: Ranking) -> tuple[EncodedRanking, ...]:
    return encode_rankings(rankings, trunk, 96)


def test_all_answers_of_a_ranking_are_in_one_micro_batch(trunk: Trunk, tmp_path: Path) -> None:
    rows = encoded(trunk, *(ranking("thank you", "the cat", "help", question=f"hello {index}") for index in range(7)))
    objective = RewardObjective(
        new_reward_model(trunk, settings_for(trunk.source, tmp_path, tmp_path)),
        rows,
        settings_for(trunk.source, tmp_path, tmp_path, batch_size=5, micro_batch_size=2),
    )
    batches = objective.micro_batches(0)
    assert [batch.batch.input_ids.shape[0] for batch in batches] == [6, 6, 3]
    assert [objective.weight(batch) for batch in batches] == pytest.approx([2.0, 2.0, 1.0])


def test_micro_batches_change_no_gradient(trunk: Trunk, tmp_path: Path) -> None:
    rows = encoded(
        trunk,
        ranking("thank you very much", "the cat sat", "help", ranks=(1, 1, 2)),
        ranking("print(add(1, 2))", "the other cat sat on the mat"),
        ranking("hello world", "cat", "mat", "help"),
    )
    gradients: list[list[Tensor]] = []
    for size in (1, 3):
        settings = settings_for(trunk.source, tmp_path, tmp_path, batch_size=3, micro_batch_size=size)
        model = new_reward_model(load_trunk(trunk.source, COMPUTE, settings), settings)
        objective = RewardObjective(model, rows, settings)
        accumulate(objective, objective.micro_batches(0))
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) > 10
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_answers_are_seen_after_the_same_turns_however_long_they_are(trunk: Trunk) -> None:
    turns = (
        ChatMessage("user", "how are you today"),
        ChatMessage("assistant", "the cat sat on the mat"),
        ChatMessage("user", "hello"),
    )
    row = Ranking(turns, ("help", "the cat sat on the mat and the other cat"), (1, 2), "test")
    (whole,) = encode_rankings([row], trunk, 200)
    length = max(map(len, whole.ids)) - 1
    (cut,) = encode_rankings([row], trunk, length)
    prompts = {ids[:-answer] for ids, answer in zip(cut.ids, cut.answer_lengths, strict=True)}
    assert len(prompts) == 1
    assert max(map(len, cut.ids)) < length
    assert cut.answer_lengths == whole.answer_lengths
    assert encode_rankings([row], trunk, 8) == ()


def test_no_prompt_is_on_both_sides_of_the_split() -> None:
    rankings = [ranking("help", f"cat {index}", question=f"hello {index % 20}") for index in range(60)]
    train, held_out = split_by_prompt(rankings, 0.1)
    assert {row.prompt for row in train}.isdisjoint(row.prompt for row in held_out)
    assert len(held_out) == 6
    assert len(train) + len(held_out) == 60


def test_rankings_of_a_single_prompt_cannot_be_split() -> None:
    with pytest.raises(DataError, match="all rankings have the same prompt"):
        split_by_prompt([ranking("a", "b"), ranking("b", "c")], 0.1)


def test_a_known_rule_is_learned_and_reported(trunk_directory: Path, tmp_path: Path) -> None:
    data = write_rankings(tmp_path / "rankings.jsonl", 160)
    out = tmp_path / "reward"
    held_out = write_rankings(tmp_path / "held_out.jsonl", 40, "held_out")
    batches: dict[str, object] = {"max_steps": 100, "epochs": 5.0, "batch_size": 8, "micro_batch_size": 8}
    run(settings_for(trunk_directory, data, out, eval_data=(held_out,), learning_rate=6e-3, **batches))

    report = json.loads((out / "reward_report.json").read_text())
    assert report["accuracy"]["value"] > 0.8
    assert report["accuracy"]["low"] > 0.5
    assert report["accuracy"]["value"] > report["before"]["value"]
    assert "# Reward model on held-out rankings" in (out / "reward_report.md").read_text()
    assert (out / "reward_report.png").stat().st_size > 1000
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.stage == "reward"
    assert manifest.parents[0].sha256 == hash_directory(trunk_directory)
    assert float(str(manifest.metrics["held_out_sign_test"])) < 0.01

    model = RewardModel.load(out, COMPUTE)
    question = ChatMessage("user", "Tell me about the cats.")
    scores = model.score(
        [(question, ChatMessage("assistant", text)) for text in ("I saw seven cats.", "I saw some cats.")]
    )
    assert scores[0] > scores[1]
    assert model.record.trunk_sha256 == hash_directory(trunk_directory)


def test_scores_of_training_answers_have_mean_zero_and_deviation_one(trunk_directory: Path, tmp_path: Path) -> None:
    data = write_rankings(tmp_path / "rankings.jsonl", 40)
    held_out = write_rankings(tmp_path / "held_out.jsonl", 10, "held_out")
    out = tmp_path / "reward"
    run(settings_for(trunk_directory, data, out, eval_data=(held_out,), method="lora", lora_rank=2))
    model = RewardModel.load(out, COMPUTE)
    rows = generate_rankings("train", 40)
    answers = [(*row.prompt, ChatMessage("assistant", answer)) for row in rows for answer in row.answers]
    scores = torch.tensor(model.score(answers))
    assert float(scores.mean()) == pytest.approx(0.0, abs=0.1)
    assert float(scores.std()) == pytest.approx(1.0, abs=0.1)
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resumed_run_continues_bit_for_bit(
    trunk_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    data = write_rankings(tmp_path / "rankings.jsonl", 24)
    changes: dict[str, object] = {"method": method, "max_steps": 6, "checkpoint_every": 3}
    changes |= {} if method == "full" else {"lora_rank": 2, "lora_dropout": 0.1}
    run(settings_for(trunk_directory, data, tmp_path / "whole", **changes))

    plain_loss = RewardObjective.loss
    calls: list[int] = []

    def crash_in_the_fifth_step(self: RewardObjective, batch: RewardBatch) -> tuple[Tensor, Mapping[str, float]]:
        calls.append(1)
        if len(calls) > 8:
            raise RuntimeError("power cut")
        return plain_loss(self, batch)

    monkeypatch.setattr(RewardObjective, "loss", crash_in_the_fifth_step)
    with pytest.raises(RuntimeError, match="power cut"):
        run(settings_for(trunk_directory, data, tmp_path / "cut", **changes))
    monkeypatch.undo()
    run(settings_for(trunk_directory, data, tmp_path / "cut", resume=True, **changes))

    for name in ("model.safetensors", "reward_head.safetensors"):
        whole, cut = load_file(tmp_path / "whole" / name), load_file(tmp_path / "cut" / name)
        assert all(torch.equal(tensor, cut[key]) for key, tensor in whole.items())
    assert (tmp_path / "whole" / "reward.json").read_text() == (tmp_path / "cut" / "reward.json").read_text()


def test_a_trunk_without_a_chat_format_is_refused(trunk_directory: Path, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    data = write_rankings(tmp_path / "rankings.jsonl", 8)
    with pytest.raises(TrainingError, match="has no chat format; train reward starts from an SFT model"):
        run(settings_for(base, data, tmp_path / "out"))


def test_a_batch_of_whole_rankings_compares_rows_of_the_same_ranking(trunk: Trunk) -> None:
    rows = encoded(trunk, ranking("help", "cat"), ranking("mat", "hello world", "thank you"))
    found = batch_of(rows)
    assert found.batch.input_ids.shape[0] == 5
    owner = [0, 0, 1, 1, 1]
    assert all(
        owner[better] == owner[worse]
        for better, worse in zip(found.pairs.better.tolist(), found.pairs.worse.tolist(), strict=True)
    )
