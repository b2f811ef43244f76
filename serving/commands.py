"""What `causerie serve` and `causerie models` do, named in the table of `serving/cli.py` and imported when called."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serving.config_sources import LoadedConfig
    from serving.models import NamedModel

_SERVE_EXAMPLES = """\
examples:
  causerie serve                                       the default model on http://127.0.0.1:8000/
  causerie serve --model qwen2.5-0.5b-instruct         another one of `causerie models list`
  causerie serve --model causerie-tiny                 the small model of our own, which comes with causerie
  causerie serve --model ./my-model --port 9000        a directory that `causerie quantize` wrote
  causerie serve --model ./my-model --min-top1-agreement 95%
                                                       not if its report says that fewer tokens agree
  causerie serve --model ./checkpoint --load-in nf4    rounded while loading, by bitsandbytes; slow on a CPU
  CAUSERIE_API_KEY=secret causerie serve --host 0.0.0.0 --allowed-hosts chat.example.org

Each setting can also stand in the TOML file, or in the environment: --kv-memory is CAUSERIE_KV_MEMORY.
"""


def models_list(argv: Sequence[str]) -> int:
    """`causerie models list [--json]`: the named models, what they need, and which are prepared already."""
    parser = argparse.ArgumentParser(
        prog="causerie models list",
        description="List the models that have a name. Any other one is given by its directory or hub id (owner/name).",
        epilog="example: causerie serve --model qwen2.5-0.5b-instruct",
    )
    parser.add_argument("--json", action="store_true", help="one JSON array instead of a table")
    as_json = parser.parse_args(argv).json

    from serving.models import NAMED_MODELS, cache_directory, model_state

    cache = cache_directory(os.environ)
    rows = [(model, model_state(cache, model.reference())) for model in NAMED_MODELS]
    if as_json:
        print(json.dumps([{**_model_record(model), "state": state} for model, state in rows], indent=2))
        return 0
    print(f"{'name':<24}{'parameters':>11}{'download':>11}{'memory':>10}  {'licence':<12}state")
    for model, state in rows:
        sizes = f"{model.download_bytes / 1e6:>8,.0f} MB{model.memory_bytes / 1e9:>7.1f} GB"
        print(f"{model.name:<24}{model.parameters / 1e9:>9.2f} B{sizes}  {model.licence:<12}{state}")
    print(f"cache: {cache}", file=sys.stderr)
    return 0


def _model_record(model: NamedModel) -> dict[str, object]:
    return {
        "name": model.name,
        "hub_id": model.hub_id,
        "licence": model.licence,
        "parameters": model.parameters,
        "download_bytes": model.download_bytes,
        "memory_bytes": model.memory_bytes,
    }


def serve(argv: Sequence[str]) -> int:
    """`causerie serve`: the chat page and the API, until Ctrl-C."""
    loaded = _read_serve_arguments(argv)
    if loaded is None:
        return 0

    from serving.serve import run_server

    return run_server(loaded)


def _read_serve_arguments(argv: Sequence[str]) -> LoadedConfig | None:
    """One flag per setting. None when `--print-config` was all that was asked for."""
    from serving.config import settings
    from serving.config_sources import load_config

    parser = argparse.ArgumentParser(
        prog="causerie serve",
        description="Serve one model: the chat page at / and the OpenAI-compatible API at /v1.",
        epilog=_SERVE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", default=None, help="TOML file with any of these settings")
    parser.add_argument("--print-config", action="store_true", default=False, help="show all settings and leave")
    groups = {"": parser.add_argument_group("settings")}
    for setting in settings():
        table = setting.key.rpartition(".")[0]
        group = groups.setdefault(table, parser.add_argument_group(table) if table not in groups else groups[table])
        default = "" if setting.default in (None, ()) or setting.is_switch else f" (default: {setting.shown_default})"
        about = (setting.help + default).replace("%", "%%")  # argparse fills in percent signs
        if setting.is_switch:
            action = argparse.BooleanOptionalAction
            group.add_argument(setting.flag, dest=setting.key, action=action, help=about)
        else:
            group.add_argument(setting.flag, dest=setting.key, metavar=setting.metavar, help=about)
    arguments = vars(parser.parse_args(argv))
    config_file, print_config = arguments.pop("config"), arguments.pop("print_config")
    loaded = load_config(arguments, os.environ, Path(config_file) if config_file is not None else None)
    if print_config:
        print(loaded.describe())
        return None
    return loaded
