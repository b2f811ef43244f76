"""`causerie pipeline --tiny`: every stage one after the other, on rows small enough for minutes, up to a chat turn.

Each stage is the command that a user would type, in a process of its own; what it gained on its own held-out rows is
read from the manifest it wrote. The preference that is learned has a known rule: an answer that names a number wins.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from quant.model_directory import read_manifest
from training.data.generated import names_a_number, write_generated
from training.errors import TrainingError
from training.improvement import sign_test

_ROOT = Path(__file__).resolve().parents[1]
_BUNDLED_ROWS = _ROOT / "tests" / "data" / "training"
_START_TIMEOUT_S = 120.0
# A stage counts as better if its held-out rows would be so by chance less often than this.
_SIGNIFICANCE = 0.05


@dataclass(frozen=True, slots=True)
class Rows:
    """Which files the stages read, and how many rows of each."""

    text: Path
    conversations: Path
    generated: Path
    max_rows: int


@dataclass(frozen=True, slots=True)
class Gain:
    """A stage's own held-out number before and after, and the sign test over its rows."""

    stage: str
    measure: str
    before: float
    after: float
    better: int
    worse: int
    seconds: float

    @property
    def p_value(self) -> float:
        return sign_test(self.better, self.worse)

    @property
    def is_better(self) -> bool:
        return self.p_value < _SIGNIFICANCE


def run(argv: Sequence[str]) -> int:
    """Returns 1 if a stage did not improve. Raises TrainingError where one failed."""
    parser = argparse.ArgumentParser(
        prog="causerie pipeline",
        description="Train, align, quantise and serve a model of about 2 million parameters, in minutes.",
    )
    parser.add_argument("--tiny", action="store_true", required=True, help="the only size that takes minutes")
    parser.add_argument("--out", type=Path, default=Path("pipeline-tiny"), metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with pretrain/ and sft/ (default: small rows)")
    arguments = parser.parse_args(argv)
    out: Path = arguments.out
    if out.exists() and any(out.iterdir()):
        raise TrainingError(f"{out} exists and is not empty; choose another --out, or delete it")
    started = time.monotonic()
    gains = train_all(choose_rows(arguments.data, out), out)
    _command("quantize", str(out / "ppo"), str(out / "quantized"), "--samples", "32", "--seq-len", "128")
    question, answer = chat_once(out / "quantized")
    report(gains, question, answer, time.monotonic() - started)
    return 0 if all(gain.is_better for gain in gains) else 1


def choose_rows(data: Path | None, out: Path) -> Rows:
    generated = out / "rows"
    write_generated(generated)
    if data is None:
        bundled = _BUNDLED_ROWS
        if not bundled.is_dir():
            raise TrainingError("the small rows are in a clone of the repository only; give --data DIR")
        return Rows(bundled / "text.jsonl.gz", bundled / "conversations.jsonl.gz", generated, 2000)
    return Rows(data / "pretrain" / "en_00.jsonl.gz", data / "sft" / "train_en.jsonl.gz", generated, 400)


def train_all(rows: Rows, out: Path) -> list[Gain]:
    """The stages in order. Each reads what the one before wrote."""
    generated = rows.generated
    common = ("--recipe", "tiny")
    limit = ("--max-rows", str(rows.max_rows))
    own = ("--conversations", str(generated / "conversations.jsonl"))
    base, sft, reward, ppo = (out / name for name in ("base", "sft", "reward", "ppo"))
    return [
        _stage("pretrain", base, *common, "--data", str(rows.text), *own, *limit),
        _stage(
            *("sft", sft, *common, "--model", str(base)),
            *("--data", str(generated / "conversations.jsonl"), str(rows.conversations), *limit),
            *("--eval-data", str(generated / "conversations_held_out.jsonl")),
        ),
        _stage(
            *("reward", reward, *common, "--model", str(sft), "--data", str(generated / "rankings.jsonl")),
            *("--eval-data", str(generated / "rankings_held_out.jsonl")),
        ),
        _stage(
            *("ppo", ppo, *common, "--model", str(sft), "--reward-model", str(reward)),
            *("--data", str(generated / "prompts.jsonl"), "--eval-data", str(generated / "prompts_held_out.jsonl")),
        ),
    ]


def chat_once(model: Path) -> tuple[str, str]:
    """Serve the directory, ask one question through the API, and stop. Returns question and answer."""
    question = "What can you say about lamps?"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["serve", "--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    print(f"\n$ causerie {shlex.join(arguments)}", flush=True)
    server = subprocess.Popen([sys.executable, "-m", "serving.cli", *arguments], cwd=_ROOT, env=_environment())
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            _wait_until_ready(client, server)
            body = {
                "model": model.name,
                "messages": [{"role": "user", "content": question}],
                "max_tokens": 40,
                "seed": 0,
                "temperature": 0.5,
            }
            response = client.post("/v1/chat/completions", json=body)
            if response.status_code != 200:
                raise TrainingError(f"the chat turn was answered with {response.status_code}: {response.text[:300]}")
            return question, str(response.json()["choices"][0]["message"]["content"])
    finally:
        server.terminate()
        server.wait(timeout=30)


def report(gains: Sequence[Gain], question: str, answer: str, seconds: float) -> None:
    print(f"\n{'stage':<10}{'held-out measure':<28}{'before':>9}{'after':>9}   better/worse   sign test   seconds")
    for gain in gains:
        counts = f"{gain.better}/{gain.worse}"
        print(
            f"{gain.stage:<10}{gain.measure:<28}{gain.before:>9.3f}{gain.after:>9.3f}{counts:>15}"
            f"{gain.p_value:>12.2g}{gain.seconds:>10.0f}"
        )
    print(f"\nuser:      {question}\nassistant: {answer.strip()}")
    print(f"\nThe rule that was rewarded: name a number. This answer does{'' if names_a_number(answer) else ' not'}.")
    print(f"All of it took {seconds:.0f} s.", flush=True)


def _stage(stage: str, out: Path, *options: str) -> Gain:
    started = time.monotonic()
    _command("train", stage, "--out", str(out), *options)
    manifest = read_manifest(out)
    assert manifest is not None  # the stage has just written it
    return _gain(stage, manifest.metrics, time.monotonic() - started)


def _gain(stage: str, metrics: Mapping[str, object], seconds: float) -> Gain:
    def number(name: str, *inner: str) -> float:
        value: object = metrics[name]
        for key in inner:
            assert isinstance(value, Mapping)
            value = value[key]
        return float(str(value))

    if stage == "reward":
        pairs = number("accuracy", "count")
        right = round(number("accuracy", "value") * pairs)
        before, after = number("accuracy_before", "value"), number("accuracy", "value")
        return Gain(stage, "pairs ranked right", before, after, right, round(pairs) - right, seconds)
    measure = "reward" if stage == "ppo" else "loss"
    label = "reward of an answer" if stage == "ppo" else "loss, nats per token"
    better, worse = round(number("held_out_rows_better")), round(number("held_out_rows_worse"))
    return Gain(
        stage, label, number(f"held_out_{measure}_before"), number(f"held_out_{measure}"), better, worse, seconds
    )


def _command(*arguments: str) -> None:
    print(f"\n$ causerie {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "serving.cli", *arguments], cwd=_ROOT, env=_environment(), check=False)
    if done.returncode != 0:
        raise TrainingError(
            f"`causerie {arguments[0]} {arguments[1]}` ended with {done.returncode}; its message is above"
        )


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1"}


def _wait_until_ready(client: httpx.Client, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise TrainingError(f"the server ended with {server.returncode}; its message is above")
        try:
            if client.get("/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TrainingError(f"the server was not ready after {_START_TIMEOUT_S:.0f} s")
