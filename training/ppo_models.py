"""Which weights the four roles of PPO have: policy, reference, reward model and critic.

With adapters a trunk is in memory once: the policy is the SFT model with one adapter, the reference the same without
it. Where the reward model was trained as an adapter on that very trunk, it and the critic are two more adapters;
otherwise the reward model has a trunk of its own, and the critic is an adapter on that. With full weights each role
that learns is a model of its own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from quant.errors import CheckpointError
from quant.model_directory import hash_directory, hash_file
from serving.model.tokenizer import TOKENIZER_FILE
from training.errors import TrainingError
from training.judge import IdJudge, Judge, TextJudge
from training.reward_model import (
    RewardHead,
    hidden_size_of,
    load_reward_head,
    load_reward_model,
    read_reward_record,
)
from training.roles import (
    CRITIC_ADAPTER,
    POLICY_ADAPTER,
    REWARD_ADAPTER,
    AdapterSwitch,
    Body,
    Critic,
    LanguageModel,
    PolicyPair,
    load_policy,
    prepare_mode,
)
from training.settings import PpoSettings
from training.trunk import (
    ADAPTER_FOLDER,
    Compute,
    Trunk,
    load_chat_format,
    load_plain_model,
    quiet,
    recompute_activations,
)

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


@dataclass(frozen=True, slots=True)
class PpoModels:
    """trunk: the policy's, as it will be written. judge: the frozen reward model."""

    trunk: Trunk
    policy: LanguageModel
    reference: LanguageModel
    judge: Judge
    critic: Critic


def load_models(settings: PpoSettings, compute: Compute) -> PpoModels:
    """Raises CheckpointError for directories that cannot be read, TrainingError for models that do not fit together."""
    pair = load_policy(
        settings.model,
        compute,
        settings,
        temperature=settings.temperature,
        checkpointing=settings.gradient_checkpointing,
    )
    reads_ids = reads_same_ids(settings.model, settings.reward_model)
    if settings.critic_from == "policy":
        judge, critic = load_judge(settings.reward_model, pair.trunk), _critic_from_policy(settings, pair)
    elif not reads_ids:
        raise TrainingError(
            f"{settings.reward_model} has another tokenizer or chat format than {settings.model}, whose tokens the "
            "critic must read; add --critic-from policy"
        )
    elif settings.method == "full":
        judge, critic = load_judge(settings.reward_model, pair.trunk), _full_critic(settings, compute)
    elif shares_trunk(settings):
        judge, critic = _both_on_policy_trunk(settings, pair)
    else:
        judge, critic = _both_on_reward_trunk(settings, pair)
    return PpoModels(pair.trunk, pair.policy, pair.reference, judge, critic)


def load_judge(directory: Path, trunk: Trunk) -> Judge:
    """A reward model on a trunk of its own, for answers of `trunk`'s model."""
    model = load_reward_model(directory, trunk.compute)
    if reads_same_ids(trunk.source, directory):
        return IdJudge(Body(model.trunk, trunk.compute), model.head)
    return TextJudge(model, trunk.tokenizer)


def reads_same_ids(policy: Path, reward_model: Path) -> bool:
    """Both have one tokenizer and one chat format: an id means the same to both."""
    paths = [directory / TOKENIZER_FILE for directory in (policy, reward_model)]
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path.parent} has no {path.name}; a model directory is needed")
    return hash_file(paths[0]) == hash_file(paths[1]) and _chat_hash(policy) == _chat_hash(reward_model)


def shares_trunk(settings: PpoSettings) -> bool:
    """The reward model is an adapter on the very weights that the policy starts from."""
    if not (settings.reward_model / ADAPTER_FOLDER / "adapter_model.safetensors").is_file():
        return False
    return read_reward_record(settings.reward_model).trunk_sha256 == hash_directory(settings.model)


def _both_on_policy_trunk(settings: PpoSettings, pair: PolicyPair) -> tuple[Judge, Critic]:
    body = pair.policy.body
    with quiet():
        for adapter in (REWARD_ADAPTER, CRITIC_ADAPTER):
            _peft(body.model).load_adapter(str(settings.reward_model / ADAPTER_FOLDER), adapter_name=adapter)
    _learn_only(body.model, POLICY_ADAPTER, CRITIC_ADAPTER)
    prepare_mode(body.model, settings, checkpointing=settings.gradient_checkpointing)
    judge = IdJudge(
        Body(body.model, body.compute, body.switch, REWARD_ADAPTER), _reward_head(settings, body).requires_grad_(False)
    )
    return judge, Critic(Body(body.model, body.compute, body.switch, CRITIC_ADAPTER), _reward_head(settings, body))


def _both_on_reward_trunk(settings: PpoSettings, pair: PolicyPair) -> tuple[Judge, Critic]:
    from peft import get_peft_model

    compute = pair.trunk.compute
    plain = load_plain_model(settings.reward_model, compute.precision)
    # Made as the policy's adapter is; it starts as the reward model itself, because B is 0.
    config = _policy_adapter_config(pair)
    with quiet():
        model = get_peft_model(plain, config, adapter_name=CRITIC_ADAPTER).to(compute.device)
    _prepare_critic(model, settings)
    body = Body(model, compute, AdapterSwitch(model), CRITIC_ADAPTER)
    judge = IdJudge(Body(model, compute, body.switch, None), _reward_head(settings, body).requires_grad_(False))
    return judge, Critic(body, _reward_head(settings, body))


def _full_critic(settings: PpoSettings, compute: Compute) -> Critic:
    model = load_plain_model(settings.reward_model, torch.float32).to(compute.device)
    _prepare_critic(model, settings)
    body = Body(model, compute)
    return Critic(body, _reward_head(settings, body))


def _critic_from_policy(settings: PpoSettings, pair: PolicyPair) -> Critic:
    """Estimates 0 everywhere at first: the mean score of a reward model's own training answers."""
    body = pair.policy.body
    if settings.method == "full":
        model = load_plain_model(settings.model, torch.float32).to(body.compute.device)
        _prepare_critic(model, settings)
        return Critic(Body(model, body.compute), _zero_head(body))
    with quiet():
        _peft(body.model).add_adapter(CRITIC_ADAPTER, _policy_adapter_config(pair))
    _learn_only(body.model, POLICY_ADAPTER, CRITIC_ADAPTER)
    prepare_mode(body.model, settings, checkpointing=settings.gradient_checkpointing)
    return Critic(Body(body.model, body.compute, body.switch, CRITIC_ADAPTER), _zero_head(body))


def _policy_adapter_config(pair: PolicyPair) -> PeftConfig:
    config = copy.deepcopy(_peft(pair.trunk.model).peft_config[POLICY_ADAPTER])
    config.base_model_name_or_path = None
    return config


def _prepare_critic(model: nn.Module, settings: PpoSettings) -> None:
    if settings.gradient_checkpointing:
        recompute_activations(model)
    prepare_mode(model, settings, checkpointing=settings.gradient_checkpointing)


def _learn_only(model: nn.Module, *adapters: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(f".{adapter}." in name for adapter in adapters))


def _reward_head(settings: PpoSettings, body: Body) -> RewardHead:
    return load_reward_head(settings.reward_model).to(body.compute.device)


def _zero_head(body: Body) -> RewardHead:
    return RewardHead(torch.zeros(1, hidden_size_of(body.model))).to(body.compute.device)


def _peft(model: nn.Module) -> PeftModel:
    return cast("PeftModel", model)


def _chat_hash(directory: Path) -> str | None:
    from serving.model.tokenizer import ModelTokenizer

    chat_format = load_chat_format(directory, ModelTokenizer.load(directory))
    return None if chat_format is None else chat_format.sha256
