"""A transformers model in the roles of reinforcement learning: one that is asked for log-probabilities, one for values.

Several roles can share one trunk in memory: each is an adapter on it, or the trunk alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from training.batches import Batch
from training.errors import TrainingError
from training.ppo_math import entropy_of
from training.settings import AdapterSettings
from training.trunk import Compute, Trunk, final_hidden, load_plain_model, load_trunk, logits_of, target_logprobs

if TYPE_CHECKING:
    from peft import PeftModel

    from training.reward_model import RewardHead

POLICY_ADAPTER = "default"  # peft's own name for the first one
CRITIC_ADAPTER = "critic"
REWARD_ADAPTER = "reward"


class AdapterSwitch:
    """Chooses which of a peft model's adapters is in effect. Which parameters learn is not its business.

    peft's own switch freezes the adapters that it leaves; here several learn in turns, so the marks are put back.
    """

    def __init__(self, model: nn.Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self._active: str | None = ""

    def activate(self, adapter: str | None) -> None:
        """None: the trunk alone."""
        if adapter == self._active:
            return
        marks = [(parameter, parameter.requires_grad) for layer in self._layers for parameter in layer.parameters()]
        for layer in self._layers:
            if adapter is None:
                layer.enable_adapters(False)
            else:
                layer.set_adapter(adapter)
                layer.enable_adapters(True)
        for parameter, learns in marks:
            parameter.requires_grad_(learns)
        self._active = adapter


@dataclass(frozen=True, slots=True)
class Body:
    """A transformers model in one role. switch: None if it has no adapters; adapter: None for the trunk alone."""

    model: nn.Module
    compute: Compute
    switch: AdapterSwitch | None = None
    adapter: str | None = None

    def hidden(self, batch: Batch) -> Tensor:
        """(rows, length, hidden) after the final norm."""
        if self.switch is not None:
            self.switch.activate(self.adapter)
        return final_hidden(self.model, batch)

    def parameters(self) -> list[nn.Parameter]:
        """Those that this role changes, in a fixed order."""
        mark = f".{self.adapter}."
        return [
            parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and (self.switch is None or mark in name)
        ]


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A body that is asked for log-probabilities: the policy or the reference."""

    body: Body
    temperature: float

    def logprobs(self, batch: Batch) -> Tensor:
        """(targets,) float32 in row order: of each target id, at the temperature. Logits exist at those places only."""
        return self.logprobs_and_entropy(batch, with_entropy=False)[0]

    def logprobs_and_entropy(self, batch: Batch, *, with_entropy: bool = True) -> tuple[Tensor, Tensor | None]:
        """Also the entropy in nats of the distribution that each target is drawn from, (targets,) float32."""
        compute = self.body.compute
        batch = batch.to(compute.device)
        with compute.autocast():
            hidden = self.body.hidden(batch)[batch.predictors()]
            logprobs, _ = target_logprobs(self.body.model, hidden, batch.targets(), temperature=self.temperature)
            if not with_entropy:
                return logprobs, None
            return logprobs, entropy_of(logits_of(self.body.model, hidden), self.temperature)


@dataclass(frozen=True, slots=True)
class Critic:
    """A body and a scalar head that estimates, before each token, the return from there on."""

    body: Body
    head: RewardHead

    def values(self, batch: Batch) -> Tensor:
        """(targets,) float32 in row order: the estimate before each target, from the position that predicts it."""
        compute = self.body.compute
        batch = batch.to(compute.device)
        with compute.autocast():
            hidden = self.body.hidden(batch)[batch.predictors()]
        return self.head(hidden)

    def parameters(self) -> list[nn.Parameter]:
        return [*self.body.parameters(), *(p for p in self.head.parameters() if p.requires_grad)]


@dataclass(frozen=True, slots=True)
class PolicyPair:
    """What learns, and the frozen model that it is held near. trunk: the policy's, as it will be written."""

    trunk: Trunk
    policy: LanguageModel
    reference: LanguageModel

    @property
    def adapter(self) -> str | None:
        return self.policy.body.adapter


def load_policy(
    directory: Path, compute: Compute, adapters: AdapterSettings, *, temperature: float, checkpointing: bool
) -> PolicyPair:
    """Both roles start from the same weights: their divergence is 0 exactly before the first update."""
    trunk = load_trunk(directory, compute, adapters, checkpointing=checkpointing)
    prepare_mode(trunk.model, adapters, checkpointing=checkpointing)
    if adapters.method == "full":
        # Not in a smaller type: its rounding would be measured as divergence.
        frozen = load_plain_model(directory, torch.float32).to(compute.device)
        frozen.eval().requires_grad_(False)
        return PolicyPair(
            trunk,
            LanguageModel(Body(trunk.model, compute), temperature),
            LanguageModel(Body(frozen, compute), temperature),
        )
    switch = AdapterSwitch(trunk.model)
    return PolicyPair(
        trunk,
        LanguageModel(Body(trunk.model, compute, switch, POLICY_ADAPTER), temperature),
        LanguageModel(Body(trunk.model, compute, switch, None), temperature),
    )


def prepare_mode(model: nn.Module, adapters: AdapterSettings, *, checkpointing: bool) -> None:
    """Without dropout: a ratio between passes with different masks means nothing. transformers recomputes activations
    in training mode only, so there each dropout is switched off by itself. Raises TrainingError if some was asked for.
    """
    if adapters.method != "full" and adapters.lora_dropout > 0:
        raise TrainingError(
            f"--lora-dropout {adapters.lora_dropout:g} would change log-probabilities between passes over the same "
            "answer; this stage needs 0"
        )
    model.train(checkpointing)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            cast("Any", module).attention_dropout = 0.0


def keep_only_policy(model: nn.Module) -> None:
    """Drop every other adapter, so that what is written of the model is the policy's."""
    adapters = getattr(model, "peft_config", {})
    if adapters:
        AdapterSwitch(model).activate(POLICY_ADAPTER)
        cast("PeftModel", model).set_adapter(POLICY_ADAPTER)
    for adapter in (REWARD_ADAPTER, CRITIC_ADAPTER):
        if adapter in adapters:
            cast("PeftModel", model).delete_adapter(adapter)
