"""`causerie train grpo`: several answers to each prompt, each judged against the others; no critic (arXiv:2402.03300).

The divergence to the reference is a term of the loss, by k3, and not of the reward. The loss is a mean over all tokens
of a step (arXiv:2503.14476, section 3.3), so that long answers weigh by their length; the paper takes a mean an answer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quant.model_directory import JsonValue, Manifest, Parent, hash_directory
from training.data.load import LoadPolicy
from training.errors import TrainingError
from training.experience import Experience, UpdatePlan, at_responses, iteration_seed, plan_updates
from training.held_out import comparison, read_held_out
from training.judge import Judge
from training.loop import accumulate, make_optimizer, optimizer_step, run_directory
from training.on_policy import require_one_process, run_iterations
from training.options import record_of
from training.policy_objective import PolicyObjective
from training.ppo_experience import describe
from training.ppo_math import group_advantages, judged_scores
from training.ppo_models import load_judge
from training.prompts import PromptSet, read_prompts, require_chat_format
from training.publish import finish_run
from training.roles import PolicyPair, load_policy
from training.rollout import Sampler, Trajectory, sample_iteration
from training.schedule import learning_rate_at
from training.settings import GrpoSettings
from training.trunk import choose_compute, manifest_config


def run(settings: GrpoSettings) -> None:
    """Load, train, measure, publish. Raises TrainingError, DataError, CheckpointError."""
    check_settings(settings)
    run_dir = run_directory(settings)
    torch.manual_seed(settings.seed)
    pair = load_policy(
        settings.model,
        choose_compute(settings.device, settings.precision),
        settings,
        temperature=settings.temperature,
        checkpointing=settings.gradient_checkpointing,
    )
    judge = load_judge(settings.reward_model, pair.trunk)
    rows, chat_format = LoadPolicy.from_settings(settings), require_chat_format(pair.trunk)
    prompts = read_prompts(settings.data, rows, chat_format, max_tokens=settings.max_prompt_tokens)
    algorithm = Grpo(settings, pair, judge, prompts)
    held_out = read_held_out(settings, chat_format, algorithm.sampler, judge)
    before = None if held_out is None else held_out.scores()
    if not run_iterations(algorithm, settings, run_dir, stage="grpo", num_iterations=settings.iterations):
        return
    metrics: dict[str, JsonValue] = dict(algorithm.last_values)
    if held_out is not None and before is not None:
        metrics |= comparison(before, held_out.scores())
    finish_run(pair.trunk, settings.out, run_dir, _manifest(settings, pair, prompts, metrics), settings)


def check_settings(settings: GrpoSettings) -> None:
    """Raises TrainingError for settings that contradict each other."""
    require_one_process(settings)
    num_answers = settings.prompts_per_iteration * settings.group_size
    if settings.batch_size > num_answers:
        raise TrainingError(
            f"--batch-size {settings.batch_size} is more than the {num_answers} answers of an iteration; lower it, or "
            "raise --prompts-per-iteration"
        )


class Grpo:
    """One run's policy and optimizer, as an algorithm of `on_policy`."""

    def __init__(self, settings: GrpoSettings, pair: PolicyPair, judge: Judge, prompts: PromptSet) -> None:
        self._settings, self._pair, self._judge, self._prompts = settings, pair, judge, prompts
        self.sampler = Sampler(pair.trunk, settings, adapter=pair.adapter)
        policy = nn.ParameterList(pair.policy.body.parameters())
        self._optimizer = make_optimizer(policy, settings)
        self.modules: Mapping[str, nn.Module] = {"policy": policy}
        self.optimizers: Mapping[str, Optimizer] = {"policy": self._optimizer}
        self.last_values: Mapping[str, float] = {}

    @property
    def num_updates(self) -> int:
        settings = self._settings
        return self._plan(torch.ones(settings.prompts_per_iteration * settings.group_size)).num_updates

    def gather(self, iteration: int) -> tuple[Experience, Mapping[str, float]]:
        settings = self._settings
        trajectory = sample_iteration(
            self.sampler,
            self._prompts,
            iteration,
            num_prompts=settings.prompts_per_iteration,
            group=settings.group_size,
            seed=settings.seed,
        )
        passes = self._plan(trajectory.lengths()).micro_batches
        scores = self._judge.score(trajectory, self._prompts.prompts, passes)
        experience = Experience(
            trajectory=trajectory,
            scores=scores,
            reference_logprobs=at_responses(trajectory, passes, self._pair.reference.logprobs),
            old_logprobs=at_responses(trajectory, passes, self._pair.policy.logprobs),
            advantages=answer_advantages(trajectory, scores, settings),
        )
        return experience, describe(experience)

    def update(self, experience: Experience, iteration: int, index: int) -> Mapping[str, float]:
        settings = self._settings
        objective = PolicyObjective(
            self._pair.policy,
            experience,
            self._plan(experience.trajectory.lengths()),
            iteration_seed(settings.seed, iteration),
            clip=settings.clip,
            kl_loss_coefficient=settings.kl_coefficient,
        )
        values = dict(accumulate(objective, objective.micro_batches(index)).values)
        rate = learning_rate_at(
            iteration * self.num_updates + index,
            settings.iterations * self.num_updates,
            peak=settings.learning_rate,
            schedule=settings.schedule,
            warmup=settings.warmup,
            final_share=settings.final_learning_rate,
        )
        norm = optimizer_step(self._optimizer, rate, settings.max_grad_norm)
        values["policy_loss"] = values.pop("loss")
        return {**values, "policy_grad_norm": norm, "learning_rate": rate}

    def finish(self, values: Mapping[str, float], num_answers: int) -> None:
        self.last_values = values

    def state(self) -> Mapping[str, JsonValue]:
        return {}

    def restore(self, state: Mapping[str, JsonValue]) -> None:
        """Nothing but modules and optimizers goes on."""

    def _plan(self, lengths: Tensor) -> UpdatePlan:
        settings = self._settings
        return plan_updates(
            lengths,
            micro_batch_size=settings.micro_batch_size,
            batch_size=settings.batch_size,
            epochs=settings.epochs,
        )


def answer_advantages(trajectory: Trajectory, scores: Tensor, settings: GrpoSettings) -> Tensor:
    """(rows, length) float32: an answer's advantage at each of its tokens, 0 elsewhere. scores: (rows,)."""
    judged = judged_scores(
        scores, trajectory.has_end, missing_end_penalty=settings.missing_end_penalty, clip=settings.reward_clip
    )
    advantages = group_advantages(judged, settings.group_size, divide_by_deviation=settings.divide_by_deviation)
    return torch.where(trajectory.is_response, advantages[:, None], 0.0)


def _manifest(
    settings: GrpoSettings, pair: PolicyPair, prompts: PromptSet, metrics: Mapping[str, JsonValue]
) -> Manifest:
    return Manifest(
        stage="grpo",
        parents=tuple(
            Parent(directory.name, hash_directory(directory)) for directory in (settings.model, settings.reward_model)
        ),
        data=prompts.files,
        config=manifest_config(record_of(settings)),
        seed=settings.seed,
        metrics=metrics,
        chat_format_sha256=require_chat_format(pair.trunk).sha256,
    )
