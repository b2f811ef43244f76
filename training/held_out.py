"""How a policy's answers to held-out prompts score before and after training: what goes into the manifest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quant.model_directory import JsonValue
from serving.model.chat_format import ChatFormat
from training.data.load import LoadPolicy
from training.experience import plan_updates
from training.improvement import loss_improvement
from training.judge import Judge
from training.prompts import PromptSet, read_prompts
from training.rollout import Sampler
from training.settings import GrpoSettings, PpoSettings


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The same prompts and the same seeds each time, so that answers differ by the weights alone."""

    prompts: PromptSet
    sampler: Sampler
    judge: Judge
    micro_batch_size: int

    def scores(self) -> Tensor:
        """(prompts,) float32, by the present weights."""
        places = range(len(self.prompts.ids))
        trajectory = self.sampler.sample(self.prompts.ids, [_seed(place) for place in places], places)
        size = self.micro_batch_size
        plan = plan_updates(trajectory.lengths(), micro_batch_size=size, batch_size=size, epochs=1)
        return self.judge.score(trajectory, self.prompts.prompts, plan.micro_batches)


def read_held_out(
    settings: PpoSettings | GrpoSettings, chat_format: ChatFormat, sampler: Sampler, judge: Judge
) -> HeldOut | None:
    """None where the settings name no held-out file."""
    if not settings.eval_data:
        return None
    prompts = read_prompts(
        settings.eval_data,
        LoadPolicy(),
        chat_format,
        max_tokens=settings.max_prompt_tokens,
        max_prompts=settings.eval_prompts,
    )
    return HeldOut(prompts, sampler, judge, settings.micro_batch_size)


def comparison(before: Tensor, after: Tensor) -> dict[str, JsonValue]:
    """For the manifest: mean scores, and by how many prompts the answer scores higher now, with a sign test."""
    return {
        "held_out_reward_before": float(before.mean()),
        "held_out_reward": float(after.mean()),
        **loss_improvement((-before).tolist(), (-after).tolist()),
    }


def _seed(place: int) -> int:
    # Far from the seeds of training, which begin with the settings' own.
    return 2**40 + place
