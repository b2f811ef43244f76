"""Where a reward model reads its score, what it gives out, and which directories it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quant.errors import CheckpointError
from serving.model.chat_format import ChatMessage
from tests.training.rl_world import HIDDEN, write_model, write_reward_model
from training.batches import Sample, pad_rows
from training.errors import TrainingError
from training.reward_model import (
    HEAD_FILE,
    RECORD_FILE,
    RewardHead,
    RewardModel,
    conversation_ids,
    fitted_ids,
    load_reward_head,
    new_head,
    read_reward_record,
)
from training.trunk import Compute, final_hidden

pytestmark = pytest.mark.unit

COMPUTE = Compute(torch.device("cpu"), torch.float32)
SHORT = (ChatMessage("user", "hello"), ChatMessage("assistant", "thank you"))
LONG = (
    ChatMessage("user", "how are you today"),
    ChatMessage("assistant", "the cat sat on the mat"),
    ChatMessage("user", "print(add(1, 2))"),
    ChatMessage("assistant", "the other cat sat on the other mat, thank you very much"),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    return write_reward_model(folder / "reward", write_model(folder / "trunk"))


@pytest.fixture(scope="module")
def model(directory: Path) -> RewardModel:
    return RewardModel.load(directory, COMPUTE)


def test_a_score_does_not_depend_on_the_other_rows_of_its_batch(model: RewardModel) -> None:
    together = model.score([SHORT, LONG, SHORT])
    assert together == pytest.approx(
        [model.score([SHORT])[0], model.score([LONG])[0], model.score([SHORT])[0]], abs=1e-5
    )


def test_pad_columns_change_nothing(model: RewardModel) -> None:
    ids = conversation_ids(model.chat_format, model.tokenizer, SHORT)
    sample = Sample(ids, (False,) * len(ids))
    with torch.no_grad():
        plain, padded = model(pad_rows([sample])), model(pad_rows([sample], len(ids) + 7))
    assert float(plain) == pytest.approx(float(padded), abs=1e-5)


@torch.no_grad()
def test_the_score_is_the_head_on_the_last_real_tokens_state(model: RewardModel) -> None:
    rows = [conversation_ids(model.chat_format, model.tokenizer, messages) for messages in (SHORT, LONG)]
    batch = pad_rows([Sample(ids, (False,) * len(ids)) for ids in rows])
    hidden = final_hidden(model.trunk, batch)
    by_hand = [float(model.head(hidden[row, len(ids) - 1])) for row, ids in enumerate(rows)]
    assert model(batch).tolist() == pytest.approx(by_hand, abs=1e-6)
    assert model.score_ids(rows).tolist() == pytest.approx(by_hand, abs=1e-5)


def test_the_score_is_read_at_the_end_of_turn_token(model: RewardModel) -> None:
    """SmolLM2's template writes a line break behind it, which is left out."""
    ids = conversation_ids(model.chat_format, model.tokenizer, SHORT)
    assert ids[-1] in model.tokenizer.eos_ids
    assert len(model.chat_format.render(SHORT, add_generation_prompt=False)) > len(ids)


def test_scores_are_given_out_in_deviations_from_the_mean(model: RewardModel) -> None:
    raw = RewardHead(model.head.weight.detach())
    hidden = torch.randn(3, HIDDEN)
    record = model.record
    assert (record.mean, record.deviation) == (0.3, 1.7)
    assert torch.allclose(model.head(hidden), (raw(hidden) - 0.3) / 1.7)


def test_scores_are_float32_also_from_bfloat16_states_under_autocast() -> None:
    head = new_head(HIDDEN, torch.Generator().manual_seed(0))
    hidden = torch.randn(4, HIDDEN).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = head(hidden)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, head(hidden.float()))


def test_a_new_head_gives_nearly_equal_scores() -> None:
    hidden = torch.nn.functional.layer_norm(torch.randn(64, 256), (256,))
    head = new_head(256, torch.Generator().manual_seed(0))
    assert float(head(hidden).detach().abs().max()) < 0.3


def test_a_long_conversation_loses_its_first_exchange(model: RewardModel) -> None:
    whole = conversation_ids(model.chat_format, model.tokenizer, LONG)
    last = conversation_ids(model.chat_format, model.tokenizer, LONG[2:])
    assert fitted_ids(model.chat_format, model.tokenizer, LONG, len(whole)) == whole
    assert fitted_ids(model.chat_format, model.tokenizer, LONG, len(whole) - 1) == last
    assert fitted_ids(model.chat_format, model.tokenizer, LONG, 10) == last[-10:]


def test_a_system_turn_stays_when_exchanges_go(model: RewardModel) -> None:
    system = ChatMessage("system", "help")
    kept = conversation_ids(model.chat_format, model.tokenizer, (system, *LONG[2:]))
    assert fitted_ids(model.chat_format, model.tokenizer, (system, *LONG), len(kept)) == kept


def test_a_conversation_without_an_answer_is_refused(model: RewardModel) -> None:
    with pytest.raises(TrainingError, match="ends with an assistant's turn"):
        model.score([SHORT[:1]])


def test_no_conversation_has_no_score(model: RewardModel) -> None:
    assert model.score([]) == []


def record(**changes: object) -> str:
    values = {"mean": 0.3, "deviation": 1.7, "trunk_sha256": "f" * 64, "length": 128}
    return json.dumps({**values, **changes})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (RECORD_FILE, None, "has no reward.json; give a directory that `causerie train reward`"),
        (RECORD_FILE, "{}", "is not a reward model's record"),
        (RECORD_FILE, record(deviation=0.0), "mean 0.3 and deviation 0.0"),
        (RECORD_FILE, record(mean="NaN"), "mean nan"),
        (HEAD_FILE, None, "cannot be read"),
        (HEAD_FILE, {"weight": torch.zeros(2, HIDDEN)}, r"expected one tensor 'weight'"),
        (HEAD_FILE, {"bias": torch.zeros(1)}, r"expected one tensor 'weight'"),
        (HEAD_FILE, {"weight": torch.full((1, HIDDEN), torch.nan)}, "not finite"),
        (HEAD_FILE, {"weight": torch.zeros(1, 8)}, "is for hidden size 8; the trunk's is 16"),
        ("chat_template.jinja", None, "has no chat template"),
    ],
)
def test_a_directory_that_is_not_whole_is_refused(
    tmp_path: Path, name: str, content: str | dict[str, torch.Tensor] | None, words: str
) -> None:
    directory = write_reward_model(tmp_path / "reward", write_model(tmp_path / "trunk"))
    (directory / name).unlink()
    if isinstance(content, str):
        (directory / name).write_text(content)
    elif content is not None:
        save_file(content, directory / name)
    with pytest.raises(CheckpointError, match=words):
        RewardModel.load(directory, COMPUTE)


def test_the_head_for_a_critic_carries_the_normalisation_and_can_learn(directory: Path, model: RewardModel) -> None:
    head = load_reward_head(directory)
    assert (head.mean, head.deviation) == (model.record.mean, model.record.deviation)
    assert head.weight.requires_grad
    assert torch.equal(head.weight, model.head.weight)
    assert read_reward_record(directory) == model.record
