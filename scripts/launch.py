"""Entry of scripts/serve, scripts/pipeline and scripts/test; the standard library is all that exists at this point.

Python puts this file's folder on its path, so `bootstrap` is found wherever the command was typed.
"""

from __future__ import annotations

import sys

from bootstrap import pipeline, run_checks, serve


def main(arguments: list[str]) -> int:
    task, *rest = arguments
    return {"serve": serve.main, "pipeline": pipeline.main, "test": run_checks.main}[task](rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
