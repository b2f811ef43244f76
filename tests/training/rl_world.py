"""Random models of a few thousand weights as directories on disk, and prompts: what the stages after SFT read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import CohereConfig, CohereForCausalLM, PreTrainedModel

from quant.model_directory import hash_directory
from serving.model.tokenizer import ModelTokenizer
from tests.serving.model.tiny_tokenizers import write_tokenizer
from training.data.load import LoadPolicy
from training.ppo import Ppo
from training.ppo_models import PpoModels, load_models
from training.prompts import read_prompts, require_chat_format
from training.ptx import read_mixture
from training.reward_model import RewardRecord, save_reward_head
from training.settings import PpoSettings
from training.trunk import ADAPTER_FOLDER, choose_compute, copy_text_files, load_plain_model, quiet

HIDDEN = 16
PROMPTS = ("hello", "how are you today", "the cat sat on the mat", "help", "print(add(1, 2))", "thank you")


def write_model(directory: Path, *, seed: int = 0, family: str = "smollm2", hidden: int = HIDDEN) -> Path:
    """A PaLM of two layers with a trained tokenizer and a chat template."""
    directory.mkdir(parents=True)
    write_tokenizer(family, directory)
    tokenizer = ModelTokenizer.load(directory)
    torch.manual_seed(seed)
    config = CohereConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        logit_scale=hidden**-0.5,
        bos_token_id=min(tokenizer.eos_ids),
        eos_token_id=min(tokenizer.eos_ids),
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = CohereForCausalLM(config)
    generation = (directory / "generation_config.json").read_text()
    with quiet():
        cast("PreTrainedModel", model).save_pretrained(str(directory))
    (directory / "generation_config.json").write_text(generation)
    return directory


def write_reward_model(directory: Path, trunk: Path, *, seed: int = 1, with_adapter: bool = False) -> Path:
    """A reward model of random head; `with_adapter` as one that was trained on `trunk` with LoRA."""
    from peft import LoraConfig, PeftModel, get_peft_model

    directory.mkdir(parents=True)
    copy_text_files(trunk, directory)
    generator = torch.Generator().manual_seed(seed)
    model = load_plain_model(trunk, torch.float32)
    if with_adapter:
        config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
        with quiet():
            wrapped = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1, generator=generator)
        wrapped.save_pretrained(str(directory / ADAPTER_FOLDER))
        plain = load_plain_model(trunk, torch.float32)
        with quiet():
            model = PeftModel.from_pretrained(plain, str(directory / ADAPTER_FOLDER)).merge_and_unload()
    with quiet():
        cast("PreTrainedModel", model).save_pretrained(str(directory))
    head = torch.randn(1, HIDDEN, generator=generator)
    save_reward_head(directory, head, RewardRecord(0.3, 1.7, hash_directory(trunk), 128))
    return directory


def write_prompts(path: Path, texts: Sequence[str] = PROMPTS) -> Path:
    rows = [{"prompt": [{"role": "user", "content": text}], "source": "test"} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_conversations(path: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text}, thank you"}]}
        for text in PROMPTS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_texts(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": f"{text}. " * 8}) + "\n" for text in PROMPTS))
    return path


@dataclass(frozen=True)
class World:
    """model: the SFT model. adapted, separate: reward models, one an adapter on it, one on a trunk of its own."""

    model: Path
    adapted: Path
    separate: Path
    prompts: Path

    def ppo_settings(self, out: Path, **changes: Any) -> PpoSettings:
        """Small, in float32, with a reward model that shares the policy's trunk."""
        defaults: dict[str, Any] = {
            "model": self.model,
            "reward_model": self.adapted,
            "out": out,
            "data": (self.prompts,),
            "precision": "float32",
            "lora_rank": 2,
            "lora_alpha": 4.0,
            "learning_rate": 1e-2,
            "rollout_size": 6,
            "batch_size": 4,
            "micro_batch_size": 2,
            "max_new_tokens": 8,
        }
        return PpoSettings(**{**defaults, **changes})


def write_world(folder: Path) -> World:
    model = write_model(folder / "sft")
    return World(
        model=model,
        adapted=write_reward_model(folder / "adapted", model, with_adapter=True),
        separate=write_reward_model(folder / "separate", write_model(folder / "other", seed=9)),
        prompts=write_prompts(folder / "prompts.jsonl"),
    )


def make_ppo(settings: PpoSettings) -> tuple[Ppo, PpoModels]:
    """As `training.ppo.run` makes it."""
    models = load_models(settings, choose_compute("cpu", settings.precision))
    rows = LoadPolicy()
    prompts = read_prompts(settings.data, rows, require_chat_format(models.trunk), max_tokens=100)
    return Ppo(settings, models, prompts, read_mixture(settings, models.trunk, rows)), models


def shake_adapter(model: nn.Module, adapter: str, seed: int = 0) -> None:
    """Make an adapter's product different from 0, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"lora_B.{adapter}." in name:
                parameter.normal_(std=0.3, generator=generator)
