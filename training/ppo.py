"""`causerie train ppo`: the policy against a reward model, with a critic, held near the model it started from.

An iteration samples answers in the serving engine, judges them, and takes a few optimizer steps on them. What a step
computes is in `policy_objective` and `ppo_math`; which weights play which role in `ppo_models`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quant.model_directory import JsonValue, Manifest, Parent, hash_directory
from training.data.load import LoadPolicy
from training.errors import TrainingError
from training.experience import Experience, UpdatePlan, at_responses, iteration_seed, plan_updates
from training.held_out import comparison, read_held_out
from training.kl_control import make_controller, restore_controller, state_of
from training.loop import accumulate, make_optimizer, optimizer_step, run_directory
from training.on_policy import require_one_process, run_iterations
from training.options import record_of
from training.policy_objective import CriticObjective, PolicyObjective
from training.ppo_experience import describe, make_experience
from training.ppo_models import PpoModels, load_models
from training.prompts import PromptSet, read_prompts, require_chat_format
from training.ptx import PtxMixture, PtxObjective, read_mixture
from training.publish import finish_run
from training.roles import keep_only_policy
from training.rollout import Sampler, sample_iteration
from training.schedule import learning_rate_at
from training.settings import PpoSettings
from training.trunk import choose_compute, manifest_config


def run(settings: PpoSettings) -> None:
    """Load, train, measure, publish. Raises TrainingError, DataError, CheckpointError."""
    check_settings(settings)
    run_dir = run_directory(settings)
    torch.manual_seed(settings.seed)
    models = load_models(settings, choose_compute(settings.device, settings.precision))
    rows = LoadPolicy.from_settings(settings)
    chat_format = require_chat_format(models.trunk)
    prompts = read_prompts(settings.data, rows, chat_format, max_tokens=settings.max_prompt_tokens)
    mixture = read_mixture(settings, models.trunk, rows)
    algorithm = Ppo(settings, models, prompts, mixture)
    held_out = read_held_out(settings, chat_format, algorithm.sampler, models.judge)
    before = None if held_out is None else held_out.scores()
    if not run_iterations(algorithm, settings, run_dir, stage="ppo", num_iterations=settings.iterations):
        return
    metrics: dict[str, JsonValue] = dict(algorithm.last_values)
    if held_out is not None and before is not None:
        metrics |= comparison(before, held_out.scores())
    keep_only_policy(models.trunk.model)
    finish_run(models.trunk, settings.out, run_dir, _manifest(settings, models, prompts, mixture, metrics), settings)


def check_settings(settings: PpoSettings) -> None:
    """Raises TrainingError for settings that contradict each other."""
    require_one_process(settings)
    if settings.critic_warmup >= settings.iterations:
        raise TrainingError(
            f"--critic-warmup {settings.critic_warmup} leaves none of {settings.iterations} iterations to the policy"
        )
    if settings.batch_size > settings.rollout_size:
        raise TrainingError(
            f"--batch-size {settings.batch_size} is more than the {settings.rollout_size} answers of an iteration; "
            "raise --rollout-size or lower --batch-size"
        )


class Ppo:
    """One run's models, optimizers and KL controller, as an algorithm of `on_policy`.

    last_values: what was logged of the last iteration that ended in this process
    """

    def __init__(
        self, settings: PpoSettings, models: PpoModels, prompts: PromptSet, mixture: PtxMixture | None
    ) -> None:
        self._settings, self._models, self._prompts = settings, models, prompts
        self.sampler = Sampler(models.trunk, settings, adapter=models.policy.body.adapter)
        # The mixture's likelihood is the model's own, whatever temperature answers are sampled at.
        plain_policy = replace(models.policy, temperature=1.0)
        self._ptx = None if mixture is None else PtxObjective(plain_policy, mixture, settings)
        policy = nn.ParameterList(models.policy.body.parameters())
        critic = nn.ParameterList(models.critic.parameters())
        self._policy_optimizer = make_optimizer(policy, settings)
        self._critic_optimizer = make_optimizer(critic, settings, settings.critic_learning_rate)
        self.modules: Mapping[str, nn.Module] = {"policy": policy, "critic": critic}
        self.optimizers: Mapping[str, Optimizer] = {"policy": self._policy_optimizer, "critic": self._critic_optimizer}
        self._controller = make_controller(
            settings.kl_control,
            coefficient=settings.kl_coefficient,
            target=settings.kl_target,
            horizon=settings.kl_horizon,
        )
        self.last_values: Mapping[str, float] = {}

    @property
    def num_updates(self) -> int:
        return self._plan(torch.ones(self._settings.rollout_size)).num_updates

    def gather(self, iteration: int) -> tuple[Experience, Mapping[str, float]]:
        settings, models = self._settings, self._models
        trajectory = sample_iteration(
            self.sampler, self._prompts, iteration, num_prompts=settings.rollout_size, group=1, seed=settings.seed
        )
        passes = self._plan(trajectory.lengths()).micro_batches
        experience = make_experience(
            trajectory,
            scores=models.judge.score(trajectory, self._prompts.prompts, passes),
            reference_logprobs=at_responses(trajectory, passes, models.reference.logprobs),
            old_values=at_responses(trajectory, passes, models.critic.values),
            old_logprobs=at_responses(trajectory, passes, models.policy.logprobs),
            kl_coefficient=self._controller.coefficient,
            settings=settings,
        )
        return experience, {**describe(experience), "kl_coefficient": self._controller.coefficient}

    def update(self, experience: Experience, iteration: int, index: int) -> Mapping[str, float]:
        values: dict[str, float] = {}
        if iteration >= self._settings.critic_warmup:
            values |= self._update_policy(experience, iteration, index)
        return values | self._update_critic(experience, iteration, index)

    def finish(self, values: Mapping[str, float], num_answers: int) -> None:
        # While only the critic learns, the divergence is 0 and says nothing about the coefficient.
        if "policy_loss" in values:
            self._controller.update(values["kl_per_answer"], num_answers)
        self.last_values = values

    def state(self) -> Mapping[str, JsonValue]:
        return {"kl_controller": state_of(self._controller)}

    def restore(self, state: Mapping[str, JsonValue]) -> None:
        restore_controller(self._controller, cast("Mapping[str, JsonValue]", state["kl_controller"]))

    def _update_policy(self, experience: Experience, iteration: int, index: int) -> dict[str, float]:
        settings = self._settings
        objective = PolicyObjective(
            self._models.policy,
            experience,
            self._plan(experience.trajectory.lengths()),
            iteration_seed(settings.seed, iteration),
            clip=settings.clip,
            entropy_coefficient=settings.entropy_coefficient,
        )
        values = dict(accumulate(objective, objective.micro_batches(index)).values)
        if self._ptx is not None:
            step = iteration * self.num_updates + index
            values |= {"ptx_loss": accumulate(self._ptx, self._ptx.micro_batches(step)).values["ptx_loss"]}
        rate = self._rate(settings.learning_rate, iteration, index)
        norm = optimizer_step(self._policy_optimizer, rate, settings.max_grad_norm)
        values["policy_loss"] = values.pop("loss")
        return {**values, "policy_grad_norm": norm, "learning_rate": rate}

    def _update_critic(self, experience: Experience, iteration: int, index: int) -> dict[str, float]:
        settings = self._settings
        objective = CriticObjective(
            self._models.critic,
            experience,
            self._plan(experience.trajectory.lengths()),
            iteration_seed(settings.seed, iteration),
            clip=settings.value_clip,
        )
        result = accumulate(objective, objective.micro_batches(index))
        rate = self._rate(settings.critic_learning_rate, iteration, index)
        norm = optimizer_step(self._critic_optimizer, rate, settings.max_grad_norm)
        return {"value_loss": result.values["loss"], "critic_grad_norm": norm}

    def _plan(self, lengths: Tensor) -> UpdatePlan:
        settings = self._settings
        return plan_updates(
            lengths,
            micro_batch_size=settings.micro_batch_size,
            batch_size=settings.batch_size,
            epochs=settings.epochs,
        )

    def _rate(self, peak: float, iteration: int, index: int) -> float:
        settings = self._settings
        return learning_rate_at(
            iteration * self.num_updates + index,
            settings.iterations * self.num_updates,
            peak=peak,
            schedule=settings.schedule,
            warmup=settings.warmup,
            final_share=settings.final_learning_rate,
        )


def _manifest(
    settings: PpoSettings,
    models: PpoModels,
    prompts: PromptSet,
    mixture: PtxMixture | None,
    metrics: Mapping[str, JsonValue],
) -> Manifest:
    chat_format = require_chat_format(models.trunk)
    return Manifest(
        stage="ppo",
        parents=tuple(
            Parent(directory.name, hash_directory(directory)) for directory in (settings.model, settings.reward_model)
        ),
        data=prompts.files + (mixture.files if mixture is not None else ()),
        config=manifest_config(record_of(settings)),
        seed=settings.seed,
        metrics=metrics,
        chat_format_sha256=chat_format.sha256,
    )
