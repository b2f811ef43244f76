"""The `causerie` command: finds the sub-command by name, calls it, and turns what went wrong into one line.

Sub-commands live in each package's `commands.py` and are imported when called, so this file loads neither torch nor
FastAPI. Exit codes: 0 done, 1 failed, 2 misuse, 130 interrupted.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TypeAlias, cast

from moderation.errors import ModerationError
from quant.errors import CheckpointError, CommandError, QuantizationError
from serving.errors import ConfigError, ServiceError

__all__ = ["COMMANDS", "end_process", "main"]

Command: TypeAlias = Callable[[Sequence[str]], int]

# name -> 'package.commands:function' and one line of help
COMMANDS: Mapping[str, tuple[str, str]] = {
    "serve": ("serving.commands:serve", "chat page and OpenAI-compatible API for one model"),
    "quantize": ("quant.commands:quantize", "write a 4-bit GPTQ directory of a model, with a quality report"),
    "merge": ("quant.commands:merge", "write a plain model directory of a base model and a peft LoRA adapter"),
    "moderate": ("moderation.commands:moderate", "judge texts with the classifier that guards the server"),
    "moderation report": ("moderation.commands:report", "how good that classifier is: curves, tables and model card"),
    "train moderation": ("moderation.commands:train_moderation", "train that classifier from its sources"),
    "train": ("training.commands:train", "pretrain, sft, reward, ppo, dpo, grpo: one stage of training"),
    "evaluate": ("training.commands:evaluate", "measure a model, and decide whether it may replace another"),
    "plan": ("training.commands:plan", "memory, time and cost of training or serving a model, before renting anything"),
    "pipeline": ("training.commands:pipeline", "all of that for a tiny model, in minutes, up to one chat turn"),
    "models list": ("serving.commands:models_list", "the models that have a name, and which are prepared"),
}

PACKAGES = ("serving", "moderation", "quant", "training", "ui")

_EXPECTED = (CheckpointError, CommandError, ConfigError, ModerationError, QuantizationError, ServiceError)

EXAMPLES = """\
examples:
  causerie serve                                 the default model on http://127.0.0.1:8000/
  causerie serve --model ./my-model --port 9000  a directory that `quantize` wrote, or any Llama-like checkpoint
  causerie quantize ./checkpoint ./my-model      4 bits, calibrated on the bundled text
  causerie moderate "how do I kill a Python process"

`causerie COMMAND --help` explains one command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of the installed command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"causerie {_version()}")
        return 0
    problem = find_shadowed_package()
    if problem is not None:
        return _fail(problem)
    found = _find_command(arguments)
    if found is None:
        print(f"causerie: {_unknown(arguments)}", file=sys.stderr)
        return 2
    target, rest = found
    return _run(target, rest)


def usage() -> str:
    width = max(len(name) for name in COMMANDS) + 2
    commands = "".join(f"  {name:<{width}}{about}\n" for name, (_, about) in COMMANDS.items())
    return (
        "usage: causerie COMMAND ...\n\n"
        "A moderated, streamed chat with a 4-bit language model, on this machine.\n\n"
        f"commands:\n{commands}  {'--version':<{width}}the version of this program\n\n{EXAMPLES}"
    )


def find_shadowed_package() -> str | None:
    """Our top-level names are common words: says which folder got in front of one of our packages, if any."""
    home = Path(__file__).resolve().parents[1]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None:
            return f"package {package!r} is missing beside {home / 'serving'}; install causerie again"
        places = [Path(place).resolve() for place in spec.submodule_search_locations or []]
        if places[:1] != [home / package]:
            found = places[0] if places else spec.origin
            return (
                f"{found} hides our package {package!r}, which is in {home}; "
                "rename it, start from another directory, or take it off PYTHONPATH"
            )
    return None


def _find_command(arguments: Sequence[str]) -> tuple[str, list[str]] | None:
    for num_words in (2, 1):
        entry = COMMANDS.get(" ".join(arguments[:num_words]))
        if entry is not None:
            return entry[0], list(arguments[num_words:])
    return None


def _unknown(arguments: Sequence[str]) -> str:
    first = arguments[0]
    group = [name for name in COMMANDS if name.startswith(f"{first} ")]
    if group:
        return f"`{first}` needs one of: {', '.join(name.removeprefix(first + ' ') for name in group)}"
    close = difflib.get_close_matches(first, [name.partition(" ")[0] for name in COMMANDS], n=1)
    hint = f"did you mean `{close[0]}`?" if close else "`causerie --help` lists the commands"
    return f"unknown command `{first}`; {hint}"


def _run(target: str, arguments: Sequence[str]) -> int:
    """Calls the sub-command; whatever it raises becomes one line. `python -X dev` shows the traceback of a bug."""
    try:
        return _load(target)(arguments)
    except _EXPECTED as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `causerie models list | head`
        sys.stderr.close()
        return 1
    except OSError as error:
        return _fail(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        return _fail(f"internal error, please report it: {type(error).__name__}: {error} ({_place(error)})")


def _place(error: Exception) -> str:
    """File and line of our code nearest to the error."""
    home = str(Path(__file__).resolve().parents[1])
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(home)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown place"


def _load(target: str) -> Command:
    module, _, function = target.partition(":")
    return cast("Command", getattr(importlib.import_module(module), function))


def _fail(message: str) -> int:
    print(f"causerie: {' '.join(message.split())}", file=sys.stderr)
    return 1


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("causerie")
    except PackageNotFoundError:
        return "unknown (not installed)"


def end_process(code: int) -> NoReturn:
    """End this process: at once, if torchrun started it.

    gloo's threads outlive their process group (device meshes hold it), and one that still lets go of a tensor while the
    interpreter is torn down aborts the process after all its work was done (pytorch/pytorch pull request 179291).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    end_process(main())
