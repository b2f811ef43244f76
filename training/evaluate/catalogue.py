"""Every measure that a report can hold: its name, what it says, and what must be given for it to be computed.

Gate rules, the report's order and the check that a rule can be decided all read from here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["CATALOGUE", "GROUPS", "GROUP_NEEDS", "Need", "computed_measures"]

Need: TypeAlias = Literal["against", "reward_model", "second_reward_model", "best_of"]

GROUPS = (
    "texts",
    "conversations",
    "kl",
    "rewards",
    "lengths",
    "refusals",
    "moderation",
    "ifeval",
    "gsm8k",
    "mt_bench",
    "vicuna",
)
# Without these a group has nothing to say at all.
GROUP_NEEDS: Mapping[str, tuple[Need, ...]] = {"kl": ("against",), "rewards": ("reward_model",)}


@dataclass(frozen=True, slots=True)
class MeasureInfo:
    """is_pairwise: it compares the two models, so the old one has none of its own."""

    group: str
    about: str
    needs: tuple[Need, ...] = ()
    is_pairwise: bool = False
    is_percent: bool = False


def _pair(group: str, about: str, *needs: Need, is_percent: bool = False) -> MeasureInfo:
    return MeasureInfo(group, about, ("against", *needs), is_pairwise=True, is_percent=is_percent)


def _share(group: str, about: str) -> MeasureInfo:
    return MeasureInfo(group, about, is_percent=True)


CATALOGUE: Mapping[str, MeasureInfo] = {
    "perplexity": MeasureInfo("texts", "of plain text, per token of its own tokenizer"),
    "bits_per_byte": MeasureInfo("texts", "of plain text, comparable across tokenizers"),
    "perplexity_increase_percent": _pair("texts", "of plain text, per token of the old model"),
    "answer_perplexity": MeasureInfo("conversations", "of the assistant's tokens in held-out conversations"),
    "answer_bits_per_byte": MeasureInfo("conversations", "of the assistant's text, comparable across tokenizers"),
    "answer_perplexity_increase_percent": _pair("conversations", "of the assistant's tokens"),
    "kl_per_token": _pair("kl", "KL from the old model in nats, on its own answers at temperature 1"),
    "kl_per_token_k3": _pair("kl", "the same by the estimator that is never negative"),
    "kl_per_answer": _pair("kl", "the same, summed over an answer"),
    "reward": MeasureInfo("rewards", "mean score by the reward model", ("reward_model",)),
    "reward_gain": _pair("rewards", "mean difference of paired scores", "reward_model"),
    "win_rate": _pair("rewards", "share of prompts won, ties half", "reward_model", is_percent=True),
    "second_reward": MeasureInfo("rewards", "mean score by the second reward model", ("second_reward_model",)),
    "second_reward_gain": _pair("rewards", "by the second reward model", "second_reward_model"),
    "second_win_rate": _pair("rewards", "by the second reward model", "second_reward_model", is_percent=True),
    "judges_disagree": _pair("rewards", "prompts on whose winner they differ", "second_reward_model", is_percent=True),
    "best_of_reward_gain": MeasureInfo("rewards", "best-of-N over the first answer", ("reward_model", "best_of")),
    "second_best_of_reward_gain": MeasureInfo(
        "rewards", "the same choice by the second", ("second_reward_model", "best_of")
    ),
    "best_of_win_rate": _pair("rewards", "best-of-N over the old model's answer", "best_of", is_percent=True),
    "second_best_of_win_rate": _pair(
        "rewards", "the same choice by the second", "second_reward_model", "best_of", is_percent=True
    ),
    "answer_tokens": MeasureInfo("lengths", "mean length of an answer, end of turn included"),
    "answer_characters": MeasureInfo("lengths", "mean length of an answer"),
    "answers_ended": _share("lengths", "answers that ended by themselves"),
    "answers_empty": _share("lengths", "answers without text"),
    "refusal_harmful": _share("refusals", "harmful requests refused, by phrases"),
    "refusal_harmless": _share("refusals", "harmless requests that look harmful, refused"),
    "flagged_answers": _share("moderation", "answers to ordinary prompts that our moderation flags"),
    "flagged_harmful": _share("moderation", "answers to harmful requests that our moderation flags"),
    "ifeval_prompt_strict": _share("ifeval", "prompts with every instruction followed"),
    "ifeval_instruction_strict": _share("ifeval", "instructions followed"),
    "ifeval_prompt_loose": _share("ifeval", "prompts, by the better of eight readings"),
    "ifeval_instruction_loose": _share("ifeval", "instructions, by the better of eight readings"),
    "gsm8k_correct": _share("gsm8k", "problems with the right final number"),
}


def computed_measures(groups: Collection[str], given: Collection[Need]) -> set[str]:
    """The measures that a run over these groups, with these things given, will hold."""
    return {
        name for name, info in CATALOGUE.items() if info.group in groups and all(need in given for need in info.needs)
    }
