"""The settings of every stage, as frozen dataclasses that load no torch. `options.read_settings` fills them.

Lengths are in tokens, batch sizes in samples, rates per optimizer step. A stage's own class says what it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from training.options import option

Method: TypeAlias = Literal["full", "lora", "qlora"]
Licences: TypeAlias = Literal["yes", "all"]
Schedule: TypeAlias = Literal["constant", "linear", "cosine"]
Precision: TypeAlias = Literal["auto", "float32", "bfloat16"]
_ADAPTERS = ("method", ("lora", "qlora"))
_PTX = ("ptx", ("mixture",))


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every run has. Checkpoints and logs lie in OUT.run until OUT is published."""

    out: Path = option(..., "model directory to write; appears whole at the end")
    seed: int = option(0, "of weights, order of the data and sampling", minimum=0)
    resume: bool = option(False, "go on from the newest checkpoint in OUT.run")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute; auto takes the GPU when there is one")
    precision: Precision = option("auto", "of matrix products; weights stay float32 (auto: bfloat16 where it is fast)")
    checkpoint_every: int = option(200, "optimizer steps between checkpoints", minimum=1)
    keep_checkpoints: int = option(2, "newest checkpoints that are kept", minimum=1)
    log_every: int = option(1, "optimizer steps between lines of the log", minimum=1)


@dataclass(frozen=True, kw_only=True)
class OptimSettings(RunSettings):
    """How weights are changed: AdamW with a warm-up and a schedule."""

    learning_rate: float = option(1e-4, "peak", above=0)
    schedule: Schedule = option("cosine", "after the warm-up")
    final_learning_rate: float = option(0.1, "at the last step, as a share of the peak", minimum=0, maximum=1)
    warmup: float = option(0.03, "share of the steps in which the rate rises linearly", minimum=0, maximum=1)
    weight_decay: float = option(0.0, "on matrices, not on norms and biases", minimum=0)
    beta1: float = option(0.9, "AdamW", minimum=0, maximum=1)
    beta2: float = option(0.95, "AdamW", minimum=0, maximum=1)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", above=0)
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, slower")
    sharding: Literal["none", "fsdp", "deepspeed"] = option(
        "none", "fsdp: weights, gradients and optimizer spread over the ranks; deepspeed: by ZeRO, cannot be resumed"
    )
    zero_stage: Literal["1", "2", "3"] = option(
        "2", "what is spread: optimizer (1), gradients too (2), weights too (3)", applies=("sharding", ("deepspeed",))
    )
    cpu_offload: bool = option(False, "keep sharded weights in main memory", applies=("sharding", ("fsdp",)))


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which rows are read, and which of them may be used."""

    data: tuple[Path, ...] = option(..., "files: .jsonl, .jsonl.gz or .jsonl.zst")
    eval_data: tuple[Path, ...] = option((), "held-out files; what also occurs in them is removed from the data")
    licences: Licences = option("all", "yes: only rows whose source may ship, by the licences file")
    licences_file: Path | None = option(None, "JSON with the sources that may ship (default: found above the data)")
    max_rows: int | None = option(None, "read at most so many rows of each file", minimum=1)
    sources: tuple[str, ...] = option((), "only rows of these sources; a name that ends in * is a prefix")


@dataclass(frozen=True, kw_only=True)
class DataCheckSettings(DataSettings):
    """Read files of rows as a stage would: name the first broken line, or say what would be used and left out."""

    kind: Literal["auto", "conversations", "rankings", "prompts", "documents"] = option(
        "auto", "of the rows; auto: by the keys of each file's first row"
    )
    clean: Path | None = option(None, "write the rows that are left to this .jsonl or .jsonl.gz file")
    json: bool = option(False, "print the report as one JSON object")


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Which weights are trained: all of them, or low-rank adapters on a frozen trunk."""

    method: Method = option("lora", "full weights, LoRA adapters, or LoRA on a trunk in 4 bits (NF4)")
    lora_rank: int = option(16, "columns of an adapter", applies=_ADAPTERS, minimum=1)
    lora_alpha: int = option(32, "adapters are scaled by alpha / rank", applies=_ADAPTERS, minimum=1)
    lora_dropout: float = option(0.0, "on the adapters' inputs", applies=_ADAPTERS, minimum=0, maximum=0.9)


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(OptimSettings, DataSettings):
    """A base model from random weights, and its tokenizer."""

    conversations: tuple[Path, ...] = option((), "files of conversations whose text is learned as well")
    size: str = option("palm-2m", "named size; `causerie plan sizes` lists them")
    vocab_size: int | None = option(None, "of the tokenizer that is trained (default: the size's)", minimum=300)
    tokenizer: Path | None = option(None, "model directory whose tokenizer is used instead of training one")
    length: int = option(512, "tokens of a packed row, and the longest context of the model", minimum=16)
    batch_size: int = option(8, "packed rows of an optimizer step", minimum=1)
    micro_batch_size: int = option(8, "packed rows of one forward pass", minimum=1)
    epochs: float = option(1.0, "times the data is seen", above=0)
    max_steps: int | None = option(None, "end after so many optimizer steps even if epochs are left", minimum=1)
    z_loss: float = option(1e-4, "coefficient of log(Z)^2, arXiv:2204.02311 section 5", minimum=0)
    learning_rate: float = option(2e-3, "peak", above=0)
    weight_decay: float = option(0.1, "on matrices, not on norms", minimum=0)


@dataclass(frozen=True, kw_only=True)
class SftSettings(OptimSettings, DataSettings, AdapterSettings):
    """A policy from a base model and conversations; loss on what the assistant says, end of turn included."""

    model: Path = option(..., "model directory to start from")
    chat_template: Path | None = option(None, "a .jinja file, for a base model without a chat format")
    length: int = option(1024, "tokens of a packed row; longer conversations lose their last turns", minimum=16)
    batch_size: int = option(8, "packed rows of an optimizer step", minimum=1)
    micro_batch_size: int = option(1, "packed rows of one forward pass", minimum=1)
    epochs: float = option(1.0, "times the data is seen", above=0)
    max_steps: int | None = option(None, "end after so many optimizer steps even if epochs are left", minimum=1)
    packing: bool = option(True, "several conversations in a row, without attention across them")


@dataclass(frozen=True, kw_only=True)
class RewardSettings(OptimSettings, DataSettings, AdapterSettings):
    """A reward model from ranked answers: a trunk and a scalar head."""

    model: Path = option(..., "model directory of the trunk; may be smaller than the policy")
    length: int = option(1024, "longest conversation in tokens; longer ones lose their first turns", minimum=16)
    held_out: float = option(
        0.05, "share of the prompts for the report", applies=("eval_data", ((),)), above=0, maximum=0.5
    )
    batch_size: int = option(16, "rankings of an optimizer step", minimum=1)
    micro_batch_size: int = option(4, "rankings of one forward pass; all answers of one stay together", minimum=1)
    epochs: float = option(1.0, "times the data is seen; more than one over-fits", above=0)
    max_steps: int | None = option(None, "end after so many optimizer steps even if epochs are left", minimum=1)


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """Sampling of answers to learn from, in the serving engine."""

    temperature: float = option(1.0, "of sampling, and of old, new and reference log-probabilities", above=0)
    max_new_tokens: int = option(128, "longest answer", minimum=1)
    max_prompt_tokens: int = option(512, "prompts longer than this are left out", minimum=1)
    kv_megabytes: int = option(256, "KV cache of the roll-out engine", minimum=1)


@dataclass(frozen=True, kw_only=True)
class PpoSettings(OptimSettings, DataSettings, AdapterSettings, RolloutSettings):
    """PPO against a reward model, held near a frozen reference, with pretraining text mixed in (arXiv:2203.02155)."""

    model: Path = option(..., "SFT model: the policy's start and the frozen reference")
    reward_model: Path = option(..., "directory that `train reward` wrote; may have a trunk and tokenizer of its own")
    critic_from: Literal["reward", "policy"] = option(
        "reward", "the critic's start: the reward model with its head, or the policy's trunk with a head of zeros"
    )
    iterations: int = option(50, "roll-out and update rounds", minimum=1)
    rollout_size: int = option(64, "answers of an iteration", minimum=1)
    batch_size: int = option(64, "answers of an optimizer step", minimum=1)
    micro_batch_size: int = option(8, "answers of one forward pass", minimum=1)
    epochs: int = option(1, "times an iteration's answers are used", minimum=1)
    learning_rate: float = option(1e-5, "of the policy", above=0)
    critic_learning_rate: float = option(5e-5, "of the critic", above=0)
    schedule: Schedule = option("constant", "after the warm-up")
    critic_warmup: int = option(0, "first iterations in which only the critic learns", minimum=0)
    kl_control: Literal["fixed", "adaptive", "lagrangian"] = option("adaptive", "how the KL coefficient moves")
    kl_coefficient: float = option(0.05, "per token, at the start", minimum=0)
    kl_target: float = option(4.0, "nats of an answer", applies=("kl_control", ("adaptive", "lagrangian")), above=0)
    kl_horizon: int = option(2000, "answers over which it adapts", applies=("kl_control", ("adaptive",)), minimum=1)
    clip: float = option(0.2, "of the policy's ratio", above=0)
    value_clip: float = option(0.2, "of a value's change, in deviations of the reward model", above=0)
    entropy_coefficient: float = option(0.0, "of the entropy bonus", minimum=0)
    gamma: float = option(1.0, "discount", minimum=0, maximum=1)
    lam: float = option(0.95, "GAE", minimum=0, maximum=1)
    reward_clip: float | None = option(None, "scores are cut to [-X, X] deviations", above=0)
    missing_end_penalty: float = option(1.0, "taken off an answer that was cut off before its end", minimum=0)
    ptx: Literal["none", "mixture"] = option("none", "mix log-likelihood of given rows into the objective")
    ptx_coefficient: float = option(
        0.5, "of their mean log-likelihood of a token, added to the objective", applies=_PTX, minimum=0
    )
    ptx_text: tuple[Path, ...] = option((), "files of plain text", applies=_PTX)
    ptx_conversations: tuple[Path, ...] = option((), "files of SFT rows; loss on the assistant's tokens", applies=_PTX)
    ptx_text_share: float = option(0.5, "rows of plain text in the mixture", applies=_PTX, minimum=0, maximum=1)
    ptx_batch_size: int = option(8, "rows of an optimizer step", applies=_PTX, minimum=1)
    ptx_length: int = option(256, "tokens of a row", applies=_PTX, minimum=16)
    eval_prompts: int = option(64, "prompts of --eval-data answered before and after, for the manifest", minimum=1)
    checkpoint_every: int = option(10, "iterations between checkpoints", minimum=1)


@dataclass(frozen=True, kw_only=True)
class DpoSettings(OptimSettings, DataSettings, AdapterSettings):
    """Direct preference optimisation on ranked answers, no reward model (arXiv:2305.18290)."""

    model: Path = option(..., "SFT model: the policy's start and the frozen reference")
    length: int = option(1024, "longest conversation in tokens; longer ones lose their first turns", minimum=16)
    held_out: float = option(
        0.05, "share of the prompts to measure on", applies=("eval_data", ((),)), above=0, maximum=0.5
    )
    batch_size: int = option(16, "rankings of an optimizer step", minimum=1)
    micro_batch_size: int = option(4, "rankings of one forward pass; all answers of one stay together", minimum=1)
    epochs: float = option(1.0, "times the data is seen", above=0)
    max_steps: int | None = option(None, "end after so many optimizer steps even if epochs are left", minimum=1)
    beta: float = option(0.1, "how strongly the reference holds", above=0)
    learning_rate: float = option(5e-6, "peak", above=0)


@dataclass(frozen=True, kw_only=True)
class GrpoSettings(OptimSettings, DataSettings, AdapterSettings, RolloutSettings):
    """Group-relative policy optimisation: no critic, several answers to each prompt (arXiv:2402.03300)."""

    model: Path = option(..., "SFT model: the policy's start and the frozen reference")
    reward_model: Path = option(..., "directory that `train reward` wrote")
    iterations: int = option(50, "roll-out and update rounds", minimum=1)
    prompts_per_iteration: int = option(8, "prompts of an iteration", minimum=1)
    group_size: int = option(8, "answers to each prompt; 2 or more", minimum=2)
    batch_size: int = option(64, "answers of an optimizer step", minimum=1)
    micro_batch_size: int = option(8, "answers of one forward pass", minimum=1)
    epochs: int = option(1, "times an iteration's answers are used", minimum=1)
    learning_rate: float = option(1e-5, "of the policy", above=0)
    schedule: Schedule = option("constant", "after the warm-up")
    clip: float = option(0.2, "of the policy's ratio", above=0)
    kl_coefficient: float = option(0.04, "of the KL term in the loss", minimum=0)
    divide_by_deviation: bool = option(True, "advantages in deviations of their group; off: arXiv:2503.20783")
    reward_clip: float | None = option(None, "scores are cut to [-X, X] deviations", above=0)
    missing_end_penalty: float = option(1.0, "taken off an answer that was cut off before its end", minimum=0)
    eval_prompts: int = option(64, "prompts of --eval-data answered before and after, for the manifest", minimum=1)
    checkpoint_every: int = option(10, "iterations between checkpoints", minimum=1)


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """What a model is measured by, alone or beside the one it would replace."""

    model: Path = option(..., "model directory to judge")
    out: Path = option(..., "directory for the report; appears whole at the end")
    against: Path | None = option(None, "model that it would replace")
    reward_model: Path | None = option(None, "judge of the win rate: a directory that `train reward` wrote")
    second_reward_model: Path | None = option(None, "another judge, to see over-optimisation of the first")
    best_of: int = option(1, "answers to each prompt, of which the reward model chooses", minimum=1)
    gate: Path | None = option(None, "TOML rules that the model must keep; exit code 1 if it does not")
    measures: tuple[str, ...] = option(
        (),
        "of texts conversations kl rewards lengths refusals moderation ifeval gsm8k mt_bench vicuna "
        "(default: all that the other options allow)",
    )
    data: Path | None = option(None, "directory with eval/, moderation/, prompts/ and sft/ (default: CAUSERIE_DATA)")
    texts: tuple[Path, ...] = option((), "plain text for the perplexity (default: DATA/eval/ppl_*)")
    conversations: Path | None = option(None, "held-out conversations (default: DATA/sft/val)")
    prompts: Path | None = option(None, "prompts for rewards, KL and lengths (default: DATA/prompts/val)")
    max_prompts: int = option(64, "questions taken of each set, evenly spaced", minimum=1)
    max_new_tokens: int = option(256, "longest answer", minimum=1)
    max_text_bytes: int = option(50_000, "taken of each plain text", minimum=256)
    temperature: float = option(1.0, "of sampling; 0 always takes the likeliest token", minimum=0)
    seed: int = option(0, "of sampling and of bootstrap intervals", minimum=0)
    precision: Literal["bfloat16", "float32"] = option("bfloat16", "of the engine; bfloat16 is what is served")
    kv_megabytes: int = option(256, "KV cache of the engine", minimum=1)


@dataclass(frozen=True, kw_only=True)
class PlanTrainSettings:
    """What training a model would take: memory of each device, a sharding that fits, time and cost."""

    model: str = option(..., "named size; `causerie plan sizes` lists them")
    gpus: str = option(..., "devices, as in 512xh100; `causerie plan devices` lists them")
    tokens: str = option(..., "tokens to train on, as in 780b, 20m or 1.5e9")
    length: int = option(2048, "tokens of a row", minimum=1)
    micro_batch_size: int = option(1, "rows of one forward pass on one device", minimum=1)
    method: Method = option("full", "full weights, LoRA adapters, or LoRA on a trunk in 4 bits (NF4)")
    lora_rank: int = option(16, "columns of an adapter", applies=_ADAPTERS, minimum=1)
    mfu: float | None = option(None, "share of the peak that is reached (default: the device's)", above=0, maximum=1)
    price: float | None = option(None, "dollars for an hour of one device (default: the device's)", minimum=0)
    json: bool = option(False, "print the plan as one JSON object")


@dataclass(frozen=True, kw_only=True)
class PlanServeSettings:
    """What serving a model would take: memory, devices that share it, speed at best and cost."""

    model: str = option(..., "named size; `causerie plan sizes` lists them")
    gpus: str = option("1xh100", "devices, as in 8xa100-80; `causerie plan devices` lists them")
    bits: Literal["4", "8", "16"] = option("4", "of a weight; 4 and 8 by GPTQ")
    length: int = option(2048, "tokens of a conversation", minimum=1)
    sequences: int = option(8, "conversations at a time", minimum=1)
    price: float | None = option(None, "dollars for an hour of one device (default: the device's)", minimum=0)
    json: bool = option(False, "print the plan as one JSON object")
