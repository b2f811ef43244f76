"""Writes trl_losses/: a tiny random model, a few rows of ids, and what TRL's trainers make of them as losses.

    python -m venv env && env/bin/pip install torch trl==1.16.0
    env/bin/python tests/data/training/make_trl_losses.py

TRL lives in an environment of its own and is never imported by the tests; they compute our losses on the same files.
The rows have unequal lengths, so that padding, targets and the last real token are all in play.
"""

# TRL is not installed where types are checked.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

TARGET = Path(__file__).parent / "trl_losses"
VOCAB_SIZE, HIDDEN = 48, 16
PAD, END = 0, 1
IGNORED = -100
QUIET: dict[str, Any] = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=END,
        initializer_range=0.3,  # of a size at which a wrong mask shows in the loss
    )
    model = LlamaForCausalLM(config).eval()
    head = torch.randn(1, HIDDEN)
    conversations = [sample(length, first_target) for length, first_target in ((13, 6), (5, 2), (9, 8), (7, 3))]
    pairs = [(ids(11), ids(6)), (ids(4), ids(9)), (ids(8), ids(8))]
    TARGET.mkdir(exist_ok=True)
    model.save_pretrained(TARGET)
    save_file({"weight": head}, TARGET / "reward_head.safetensors")
    record = {
        "written_by": f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}",
        "sft": {"rows": conversations, "loss": sft_loss(model, conversations)},
        "reward": {
            "pairs": [{"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs],
            "loss": reward_loss(config, model, head, pairs),
        },
    }
    (TARGET / "losses.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def ids(length: int) -> list[int]:
    """Random ids that end in the end-of-turn token."""
    return [*torch.randint(2, VOCAB_SIZE, (length - 1,)).tolist(), END]


def sample(length: int, first_target: int) -> dict[str, list[int]]:
    found = ids(length)
    return {"input_ids": found, "labels": [IGNORED] * first_target + found[first_target:]}


def sft_loss(model: LlamaForCausalLM, rows: list[dict[str, list[int]]]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(output_dir=folder, dataset_kwargs={"skip_prepare_dataset": True}, **QUIET),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
        )
        with torch.no_grad():
            return float(trainer.compute_loss(trainer.model, trainer.data_collator(rows)))


def reward_loss(
    config: LlamaConfig, model: LlamaForCausalLM, head: torch.Tensor, pairs: list[tuple[list[int], list[int]]]
) -> float:
    config.num_labels = 1
    reward_model = LlamaForSequenceClassification(config).eval()
    reward_model.model.load_state_dict(model.model.state_dict())
    reward_model.score.weight.data.copy_(head)
    rows = [{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in pairs]
    with tempfile.TemporaryDirectory() as folder:
        trainer = RewardTrainer(
            model=reward_model,
            args=RewardConfig(output_dir=folder, **QUIET),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
        )
        with torch.no_grad():
            return float(trainer.compute_loss(trainer.model, trainer.data_collator(rows)))


def tokenizer() -> PreTrainedTokenizerFast:
    """The trainers ask for one; the rows are ids already."""
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(VOCAB_SIZE)}, unk_token="w2"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w2")


if __name__ == "__main__":
    main()
