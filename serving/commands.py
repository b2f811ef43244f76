"""What `causerie serve` and `causerie models` do, named in the table of `serving/cli.py` and imported when called."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serving.models import NamedModel


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
