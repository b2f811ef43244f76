"""The other projects' side of benchmarks/training.py: one measurement in their environment, one JSON line at the end.

Imports nothing of Causerie, and each peer only where it is used. Not for the project's own environment.

    ENV/bin/python benchmarks/training_peers.py trl-sft TASK.json
"""
# The peers are not installed where types are checked.
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

IGNORED = -100


def main(argv: list[str]) -> None:
    kind, path = argv
    task = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    measure = {"trl-sft": trl_sft, "trl-ppo": trl_ppo, "trl-reward": trl_reward, "palm-ppo": palm_ppo}[kind]
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(task, folder)))


class StepEnds(TrainerCallback):
    """When each optimizer step was done."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.ends.append(time.perf_counter())


def trl_sft(task: dict[str, Any], folder: str) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    noted = StepEnds()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.bfloat16),
        args=SFTConfig(
            **common_arguments(task, folder),
            max_steps=task["steps"],
            per_device_train_batch_size=task["batch_size"],
            train_sampling_strategy="sequential",
            dataset_kwargs={"skip_prepare_dataset": True},
            gradient_checkpointing=task["peer_defaults"],
        ),
        train_dataset=Dataset.from_list(task["rows"]),
        processing_class=AutoTokenizer.from_pretrained(task["model"]),
        peft_config=lora(task, "CAUSAL_LM"),
        callbacks=[noted],
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"ends": noted.ends, "losses": losses}


def trl_reward(task: dict[str, Any], folder: str) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    model = AutoModelForSequenceClassification.from_pretrained(task["model"], num_labels=1, dtype=torch.bfloat16)
    started = time.perf_counter()
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            **common_arguments(task, folder),
            num_train_epochs=1,
            per_device_train_batch_size=task["batch_size"],
            per_device_eval_batch_size=task["batch_size"],
            max_length=None,
            gradient_checkpointing=task["peer_defaults"],
        ),
        train_dataset=Dataset.from_list(task["train_rows"]),
        eval_dataset=Dataset.from_list(task["test_rows"]),
        processing_class=tokenizer,
        peft_config=lora(task, "SEQ_CLS", modules_to_save=["score"]),
    )
    trainer.train()
    # Not the trainer's own mean over batches: the last one is smaller, and ties count half here.
    credit = 0.0
    trainer.model.eval()
    for start in range(0, len(task["test_rows"]), task["batch_size"]):
        batch = trainer.data_collator(task["test_rows"][start : start + task["batch_size"]])
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            chosen, rejected = trainer.model(**batch).logits.float().squeeze(-1).chunk(2)
        credit += float((chosen > rejected).sum() + 0.5 * (chosen == rejected).sum())
    return {"right": credit, "count": len(task["test_rows"]), "seconds": time.perf_counter() - started}


def trl_ppo(task: dict[str, Any], folder: str) -> dict[str, Any]:
    """The last release with a PPOTrainer is 1.12.0; the driver puts it before the newer one on the path."""
    from datasets import Dataset
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[task["precision"]]
    tokenizer = AutoTokenizer.from_pretrained(task["model"], padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})

    def scorer() -> Any:
        found = AutoModelForSequenceClassification.from_pretrained(task["model"], num_labels=1, dtype=dtype)
        found.config.pad_token_id = tokenizer.pad_token_id
        return found

    value = scorer()
    # Adapters on the critic too, as ours has them: inside the model, since the trainer looks up its backbone by name.
    if not task["peer_defaults"]:
        inject_adapter_in_model(LoraConfig(**lora_arguments(task)), value.model)
    noted = StepEnds()
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=folder,
            report_to="none",
            use_cpu=True,
            bf16=task["precision"] == "bfloat16",
            save_strategy="no",
            gradient_checkpointing=task["peer_defaults"],
            per_device_train_batch_size=task["micro_batch_size"],
            gradient_accumulation_steps=task["rollout_size"] // task["micro_batch_size"],
            local_rollout_forward_batch_size=task["rollout_size"],
            num_mini_batches=1,
            num_ppo_epochs=task["epochs"],
            total_episodes=task["iterations"] * task["rollout_size"],
            response_length=task["max_new_tokens"],
            temperature=1.0,
            num_sample_generations=0,
            learning_rate=1e-5,
            stop_token=None,
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(task["model"], dtype=dtype),
        ref_model=None,
        reward_model=scorer(),
        value_model=value,
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in task["prompt_ids"]]),
        peft_config=lora(task, "CAUSAL_LM"),
        eval_dataset=Dataset.from_list([{"input_ids": task["prompt_ids"][0]}]),
        callbacks=[noted],
    )
    started = time.perf_counter()
    trainer.train()
    return per_iteration(started, noted.ends, task)


def palm_ppo(task: dict[str, Any], folder: str) -> dict[str, Any]:
    from palm_rlhf_pytorch import PaLM, RewardModel, RLHFTrainer

    palm = PaLM(**task["palm"])
    prompts = torch.tensor(task["prompt_ids"])
    trainer = RLHFTrainer(
        palm=palm,
        reward_model=RewardModel(palm, num_binned_output=5),
        prompt_token_ids=prompts,
        minibatch_size=task["micro_batch_size"],
        epochs=task["epochs"],
        accelerate_kwargs={"cpu": True},
    )
    count = sum(parameter.numel() for parameter in set(palm.palm_parameters()))
    started = time.perf_counter()
    ends: list[float] = []
    for _ in range(task["iterations"]):
        trainer.train(
            num_episodes=1,
            max_timesteps=task["rollout_size"],
            update_timesteps=task["rollout_size"],
            max_seq_len=prompts.shape[1] + task["max_new_tokens"],
        )
        ends.append(time.perf_counter())
    return {**per_iteration(started, ends, task), "parameters": count}


def per_iteration(started: float, ends: list[float], task: dict[str, Any]) -> dict[str, Any]:
    """Every answer has its full length: neither peer is told an end token."""
    seconds = [end - start for start, end in zip([started, *ends], ends, strict=False)]
    tokens = task["rollout_size"] * task["max_new_tokens"]
    return {"seconds": seconds, "tokens_per_s": [tokens / spent for spent in seconds]}


def common_arguments(task: dict[str, Any], folder: str) -> dict[str, Any]:
    """The optimizer is the same on both sides: AdamW at a constant rate, gradients clipped at 1."""
    optimizer = task["optimizer"]
    return {
        "output_dir": folder,
        "report_to": "none",
        "use_cpu": True,
        "bf16": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": optimizer["learning_rate"],
        "lr_scheduler_type": "constant",
        "adam_beta1": optimizer["beta1"],
        "adam_beta2": optimizer["beta2"],
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "dataloader_pin_memory": False,
    }


def lora_arguments(task: dict[str, Any]) -> dict[str, Any]:
    adapter = task["adapter"]
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return {"r": adapter["lora_rank"], "lora_alpha": adapter["lora_alpha"], "target_modules": modules}


def lora(task: dict[str, Any], task_type: str, **others: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type=task_type, **lora_arguments(task), **others)


if __name__ == "__main__":
    main(sys.argv[1:])
