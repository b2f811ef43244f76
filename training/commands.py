"""`causerie train STAGE`, `causerie evaluate` and `causerie plan`: settings from recipe and flags, then the stage."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

__all__ = ["evaluate", "pipeline", "plan", "train"]

EXAMPLES = """\
examples:
  causerie train pretrain --recipe tiny --data text.jsonl.gz --out ./base
  causerie train sft --model ./base --data conversations.jsonl --out ./sft --method full
  causerie train reward --model ./sft --data rankings.jsonl --out ./reward
  causerie train ppo --model ./sft --reward-model ./reward --data prompts.jsonl --out ./policy
  torchrun --nproc-per-node 2 -m serving.cli train sft --recipe 135m --model M --data D --out O --sharding fsdp
  causerie train STAGE --help

Ctrl-C saves; the same command with --resume goes on as if nothing had happened.
"""

EVALUATE_EXAMPLES = """\
examples:
  causerie evaluate ./policy --out ./report --data ./data
  causerie evaluate ./policy --against ./sft --reward-model ./reward --gate rules.toml --out ./report
  causerie evaluate ./policy --against ./sft --reward-model ./reward --second-reward-model ./other --best-of 8 --out R
  causerie evaluate ./quantised --against ./policy --measures texts conversations kl --out ./report

A gate file holds rules such as:

  perplexity_increase_percent = {max = 3}
  win_rate_lower = {min = 0.5}              # lower end of the 95 % interval
  refusal_harmful_change = {min = -0.02}    # new minus old
"""


@dataclass(frozen=True, slots=True)
class Stage:
    """settings: name of its class in `training.settings`; run: 'module:function' that takes them."""

    settings: str
    run: str
    help: str


STAGES: Mapping[str, Stage] = {
    "data": Stage(
        "DataCheckSettings", "training.data.check:run", "check and clean data files before anything is trained"
    ),
    "pretrain": Stage("PretrainSettings", "training.pretrain:run", "a base model and its tokenizer from text"),
    "sft": Stage("SftSettings", "training.sft:run", "a policy from a base model and conversations"),
    "reward": Stage("RewardSettings", "training.reward:run", "a reward model from ranked answers"),
    "ppo": Stage("PpoSettings", "training.ppo:run", "PPO against a reward model, near the SFT model"),
    "dpo": Stage("DpoSettings", "training.dpo:run", "direct preference optimisation on pairs"),
    "grpo": Stage("GrpoSettings", "training.grpo:run", "group-relative policy optimisation, no critic"),
}
EVALUATE = Stage(
    "EvaluateSettings", "training.evaluate.run:run", "measure a model, and decide whether it may replace another"
)


def train(argv: Sequence[str]) -> int:
    """`causerie train STAGE ...`. Raises TrainingError with one line."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(), end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    stage = STAGES.get(argv[0])
    if stage is None:
        near = difflib.get_close_matches(argv[0], [*STAGES, "moderation"], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; stages are: {', '.join([*STAGES, 'moderation'])}"
        print(f"causerie train: {argv[0]!r} is no stage{hint}", file=sys.stderr)
        return 2
    return _run(f"train {argv[0]}", stage, argv[1:], EXAMPLES)


def evaluate(argv: Sequence[str]) -> int:
    """`causerie evaluate MODEL ...`. Raises GateFailed, so exits with 1, if the gate does not let the model pass."""
    arguments = ["--model", *argv] if argv and not argv[0].startswith("-") else argv
    return _run("evaluate", EVALUATE, arguments, EVALUATE_EXAMPLES)


def pipeline(argv: Sequence[str]) -> int:
    """`causerie pipeline --tiny`: all stages, then one chat turn."""
    from training.pipeline import run

    return run(argv)


def plan(argv: Sequence[str]) -> int:
    """`causerie plan train|serve|sizes|devices`. Returns 1 if what is planned does not fit."""
    from training.plan.run import plan

    return plan(argv)


def _run(name: str, stage: Stage, argv: Sequence[str], examples: str) -> int:
    from training.options import read_settings

    kind = cast("type[object]", getattr(importlib.import_module("training.settings"), stage.settings))
    description = " ".join((kind.__doc__ or stage.help).split())
    settings = read_settings(kind, name, argv, description=description, examples=examples)
    module, _, function = stage.run.partition(":")
    run = cast("Callable[[object], int | None]", getattr(importlib.import_module(module), function))
    return run(settings) or 0


def _usage() -> str:
    width = max(map(len, STAGES))
    lines = [f"  {name:<{width}}  {stage.help}" for name, stage in STAGES.items()]
    return "usage: causerie train STAGE [options]\n\nstages:\n" + "\n".join(lines) + "\n\n" + EXAMPLES
