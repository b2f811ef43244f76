"""The whole loop on the rows of this repository: text to a chat turn with a 4-bit, RLHF-tuned model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from quant.model_directory import hash_directory, read_manifest

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("pretrain", "sft", "reward", "ppo")


def test_every_stage_gains_and_the_last_model_answers(tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    command = [sys.executable, "-P", "-m", "serving.cli", "pipeline", "--tiny", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = {line.split()[0]: line for line in done.stdout.splitlines() if line.split()[:1] and "/" in line}
    assert all(stage in table for stage in STAGES)
    assert "assistant: " in done.stdout
    parents = {"sft": "base", "reward": "sft", "ppo": "sft", "quantized": "ppo"}
    for name, parent in parents.items():
        manifest = read_manifest(out / name)
        assert manifest is not None
        assert hash_directory(out / parent) in {each.sha256 for each in manifest.parents}, name
