"""From a fresh clone, an empty home and an empty cache to the first token, and how long a second start takes.

    python -m benchmarks.first_run

Clones this repository's HEAD into a temporary folder and runs its `scripts/serve`; needs the network, as a user does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.load import Load, run_load
from benchmarks.serve import first_model
from benchmarks.servers import free_port, running

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder))
    for name, value in rows.items():
        print(f"{name:<28} {value:>10.1f}")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


def measure(folder: Path) -> dict[str, float]:
    """Seconds, and the perplexity change that the report beside the prepared model states."""
    clone, home = folder / "causerie", folder / "home"
    home.mkdir()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    for name in ("CAUSERIE_CACHE", "VIRTUAL_ENV", "PYTHONPATH"):
        environment.pop(name, None)
    started = time.monotonic()
    rows: dict[str, float] = {}
    with served(clone, environment) as server:
        rows["clone_to_ready_s"] = time.monotonic() - started
        first = asyncio.run(run_load(Load(server.base_url, first_model(server.base_url), 1, max_tokens=8)))
        rows["clone_to_first_token_s"] = rows["clone_to_ready_s"] + first.ttft_p50_s
    with served(clone, environment) as server:
        rows["second_start_to_ready_s"] = server.start_s
    report = json.loads(next((home / ".cache").rglob("quantization_report.json")).read_text(encoding="utf-8"))
    rows["quantize_s"] = report["quantize_seconds"]
    rows["quantize_and_measure_s"] = report["total_seconds"]
    rows["perplexity_increase_percent"] = report["perplexity_increase_percent"]
    return rows


def served(clone: Path, environment: dict[str, str]):  # noqa: ANN201 - a context manager of benchmarks.servers
    port = free_port()
    command = [str(clone / "scripts" / "serve"), "--port", str(port)]
    return running(command, f"http://127.0.0.1:{port}", "/health/ready", environment)


if __name__ == "__main__":
    raise SystemExit(main())
