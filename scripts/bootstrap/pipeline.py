"""What scripts/pipeline does: installs what training needs, then this process becomes `causerie pipeline`."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bootstrap import problems, torch_choice
from bootstrap.environment import Environment, install
from bootstrap.problems import SetupError
from bootstrap.serve import venv_directory

EXTRAS = ("train",)
TRAIN_DISK_MB = 800
HELP = """\
usage: scripts/pipeline --tiny [--out DIR] [--data DIR]

Pretrains a model of about 2 million parameters, tunes it, trains a reward model, runs PPO, quantises the result to 4
bits, serves it, and has one chat turn with it. Sets up .venv first, as scripts/serve does."""


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return 0
    root = Path(__file__).resolve().parents[2]
    environment = Environment(root, venv_directory(root, os.environ))
    try:
        set_up(environment, os.environ)
        return become_pipeline(environment, arguments)
    except SetupError as error:
        print(f"scripts/pipeline: {error.problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Run scripts/pipeline again: what is installed stays.", file=sys.stderr)
        return 130


def set_up(environment: Environment, variables: Mapping[str, str]) -> None:
    if environment.is_ready(EXTRAS) or environment.is_ready(("dev",)):
        return
    existing = next(path for path in (environment.directory, *environment.directory.parents) if path.exists())
    torch_mb = torch_choice.CUDA_DISK_MB if torch_choice.has_nvidia_driver() else torch_choice.CPU_DISK_MB
    needed_mb = TRAIN_DISK_MB + torch_mb
    problem = problems.check_disk(existing, needed_mb, shutil.disk_usage(existing).free // 1_000_000)
    if problem:
        raise SetupError(problem.what, problem.cure)
    print(f"Setting up for training: about {needed_mb:,} MB in {environment.directory}, once", file=sys.stderr)
    install(environment, EXTRAS, variables, say=lambda line: print(f"  - {line}", file=sys.stderr))


def become_pipeline(environment: Environment, arguments: Sequence[str]) -> int:
    """In place of this process, as scripts/serve does it."""
    os.execv(environment.command("causerie"), ["causerie", "pipeline", *arguments])  # noqa: S606
