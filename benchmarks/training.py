"""Training beside TRL and palm-rlhf-pytorch: same weights, rows, settings and machine, in turns; prints the ratios.

    python -m benchmarks.training --data ../shared/data

The peers live in an environment of their own under --work-dir, made on the first run (torch for the CPU, some 1.5 GB).
Every measurement is a process; the sides alternate, ABBA, so that a drifting machine hits both. Parts:

    sft     LoRA on SmolLM2-135M in bfloat16, padded rows: tokens/s of the steps after the first, and the losses
    ppo     LoRA on SmolLM2-135M: one iteration, roll-out and update, in sampled tokens/s, against TRL's PPOTrainer
    palm    a PaLM of 10M random weights: the same against palm-rlhf-pytorch
    reward  LoRA on SmolLM2-135M, one epoch over the same pairs: accuracy on the same held-out pairs

TRL removed its PPOTrainer after release 1.12.0, so that part runs that release; the others run the current one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

TRL, TRL_WITH_PPO, PALM_RLHF = "1.16.0", "1.12.0", "0.8.0"
PARTS = ("sft", "ppo", "palm", "reward")
GOALS = {"sft": 1.3, "ppo": 3.0, "palm": 5.0}
ADAPTER: dict[str, object] = {"lora_rank": 16, "lora_alpha": 32.0}
OPTIMIZER: dict[str, object] = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95}
PEERS_SCRIPT = Path(__file__).with_name("training_peers.py")


@dataclass(frozen=True, slots=True)
class Peers:
    """python: of the environment with the current TRL. trl_with_ppo: a folder with the older one alone."""

    python: Path
    trl_with_ppo: Path


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second of each round, and median of the rounds' ratios."""

    part: str
    peer: str
    ours: list[float]
    theirs: list[float]
    notes: Mapping[str, Any]

    @property
    def ratio(self) -> float:
        return median(ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    work = Path(options.work_dir).expanduser()
    work.mkdir(parents=True, exist_ok=True)
    peers = make_peers(work)
    found: dict[str, Any] = {"machine": machine(options.threads), "peer_defaults": options.peer_defaults}
    measure: dict[str, Callable[[argparse.Namespace, Path, Peers], dict[str, Any]]] = {
        "sft": measure_sft,
        "ppo": measure_ppo,
        "palm": measure_palm,
        "reward": measure_reward,
    }
    for part in options.parts:
        found[part] = measure[part](options, work, peers)
        print(json.dumps({part: found[part]}, indent=2), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found))
    return 0


def make_peers(work: Path) -> Peers:
    """Done once; an environment that is there already is used as it is."""
    environment, older = work / "training-peers" / "env", work / "training-peers" / "trl-ppo"
    python = environment / "bin" / "python"
    if not (environment / "bin" / "accelerate").exists():
        venv.create(environment, with_pip=True)
        packages = [*torch_arguments(), f"trl=={TRL}", f"palm-rlhf-pytorch=={PALM_RLHF}", "peft"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    if not older.exists():
        pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", older]
        subprocess.run([*pip, f"trl=={TRL_WITH_PPO}"], check=True)
    return Peers(python, older)


def torch_arguments() -> list[str]:
    """For pip: the very build that Causerie runs on. A difference of builds is none of frameworks."""
    import torch

    index = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"] if "+cpu" in torch.__version__ else []
    return [*index, f"torch=={torch.__version__}"]


def measure_sft(options: argparse.Namespace, work: Path, peers: Peers) -> dict[str, Any]:
    from training.data.load import LoadPolicy, load_conversations
    from training.sft import render_sample
    from training.trunk import load_chat_format

    tokenizer, model = _tokenizer(options)
    chat_format = load_chat_format(model, tokenizer)
    assert chat_format is not None
    rows = load_conversations([Path(options.data) / "sft" / "val.jsonl.gz"], LoadPolicy()).rows
    samples = [render_sample(row.messages, chat_format, options.length) for row in rows]
    # Long ones: a step of little padding, whose time is that of its tokens.
    whole = sorted((sample for sample in samples if sample is not None), key=lambda sample: -len(sample.ids))
    chosen = whole[: options.steps * options.batch_size]
    task = {
        **_common(options, model),
        "steps": options.steps,
        "batch_size": options.batch_size,
        "rows": [
            {
                "input_ids": list(sample.ids),
                "labels": [
                    token if counts else -100 for token, counts in zip(sample.ids, sample.is_target, strict=True)
                ],
            }
            for sample in chosen
        ],
    }
    # The first step warms up; its tokens and time are left out.
    tokens = sum(len(sample.ids) for sample in chosen[options.batch_size :])
    ours, theirs = in_turns(options, work, "sft", task, peers, "trl-sft")

    def speed(result: Mapping[str, Any]) -> float:
        return tokens / (result["ends"][-1] - result["ends"][0])

    gaps = [abs(a - b) / b for a, b in zip(ours[0]["losses"], theirs[0]["losses"], strict=True)]
    notes = {"losses_ours": ours[0]["losses"], "losses_theirs": theirs[0]["losses"], "largest_loss_gap": max(gaps)}
    return record(Speed("sft", f"TRL {TRL}", [speed(one) for one in ours], [speed(one) for one in theirs], notes))


def measure_ppo(options: argparse.Namespace, work: Path, peers: Peers) -> dict[str, Any]:
    """The reward model is the same trunk with a random head on both sides: what it prefers costs no time."""
    tokenizer, model = _tokenizer(options)
    prompts = Path(options.data) / "prompts" / "val.jsonl.gz"
    chosen = short_prompts(prompts, model, tokenizer, options, work / "ppo-prompts.jsonl")
    task = {
        **_ppo_task(options, model),
        "reward_model": str(random_reward_model(model, work / "ppo-reward-model")),
        "prompts": str(work / "ppo-prompts.jsonl"),
        "prompt_ids": chosen,
        "precision": "bfloat16",
    }
    ours, theirs = in_turns(options, work, "ppo", task, peers, "trl-ppo", older_trl=True)
    return record(_iterations("ppo", f"TRL {TRL_WITH_PPO}", ours, theirs))


def measure_palm(options: argparse.Namespace, work: Path, peers: Peers) -> dict[str, Any]:
    """palm-rlhf-pytorch has 64 of head size, 4 times the width inside and one key/value head; so is ours here."""
    from training.sizes import find_size

    model, parameters = random_palm(Path(options.data), work / "palm-model")
    size = find_size("palm-10m")
    tokenizer = _load_tokenizer(model)
    prompts = Path(options.data) / "prompts" / "val.jsonl.gz"
    chosen = short_prompts(prompts, model, tokenizer, options, work / "palm-prompts.jsonl", is_one_length=True)
    task = {
        **_ppo_task(options, model),
        "reward_model": str(random_reward_model(model, work / "palm-reward-model")),
        "prompts": str(work / "palm-prompts.jsonl"),
        "prompt_ids": chosen,
        "precision": "float32",
        "palm": {
            "dim": size.hidden,
            "num_tokens": size.vocab,
            "depth": size.layers,
            "heads": size.heads,
            "dim_head": size.head_dim,
        },
    }
    ours, theirs = in_turns(options, work, "ppo", task, peers, "palm-ppo")
    notes = {"parameters_ours": parameters, "parameters_theirs": theirs[0]["parameters"]}
    return record(_iterations("palm", f"palm-rlhf-pytorch {PALM_RLHF}", ours, theirs, notes))


def measure_reward(options: argparse.Namespace, work: Path, peers: Peers) -> dict[str, Any]:
    from training.data.load import LoadPolicy, load_rankings
    from training.data.records import encode_row
    from training.evaluate.intervals import Measure, share_measure
    from training.reward import encode_ranking
    from training.trunk import load_chat_format

    tokenizer, model = _tokenizer(options)
    chat_format = load_chat_format(model, tokenizer)
    assert chat_format is not None
    task: dict[str, Any] = {**_common(options, model), "length": options.length, "batch_size": 8}
    for name, count in (("train", options.train_pairs), ("test", options.test_pairs)):
        rows = load_rankings([Path(options.data) / "preference" / f"{name}.jsonl.gz"], LoadPolicy()).rows
        encoded = [(row, encode_ranking(row, chat_format, tokenizer, options.length)) for row in rows]
        fitting = [(row, found) for row, found in encoded if found is not None]
        chosen = fitting[:: max(1, len(fitting) // count)][:count]
        task[name] = str(work / f"reward-{name}.jsonl")
        Path(task[name]).write_bytes(b"".join(encode_row(row) + b"\n" for row, _ in chosen))
        task[f"{name}_rows"] = [
            {"chosen_ids": list(found.ids[0]), "rejected_ids": list(found.ids[1])} for _, found in chosen
        ]
    ours, theirs = in_turns(options, work, "reward", task, peers, "trl-reward", rounds=1)
    right, count = theirs[0]["right"], theirs[0]["count"]
    # share_measure takes outcomes; a half stands for a tie.
    peer: Measure = share_measure([1.0] * int(right) + [0.5] * int(right % 1 > 0) + [0.0] * (count - int(right + 0.5)))
    return {
        "accuracy_ours": ours[0]["accuracy"],
        "accuracy_theirs": asdict(peer),
        "peer": f"TRL {TRL}",
        "is_no_worse": ours[0]["accuracy"]["value"] >= (peer.low or 0.0),
        "seconds_ours": ours[0]["seconds"],
        "seconds_theirs": theirs[0]["seconds"],
    }


def in_turns(
    options: argparse.Namespace,
    work: Path,
    part: str,
    task: Mapping[str, Any],
    peers: Peers,
    peer_kind: str,
    *,
    older_trl: bool = False,
    rounds: int | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Both sides once a round; who goes first alternates."""
    path = work / f"task-{peer_kind}.json"
    path.write_text(json.dumps(task), encoding="utf-8")
    root = Path(__file__).resolve().parents[1]
    ours_command = [sys.executable, "-m", "benchmarks.training_ours", part, str(path)]
    peer_command = [str(peers.python), str(PEERS_SCRIPT), peer_kind, str(path)]
    quiet = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
    with_older = {**quiet, "PYTHONPATH": str(peers.trl_with_ppo)} if older_trl else quiet
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for index in range(options.rounds if rounds is None else rounds):
        sides = [(ours, ours_command, quiet), (theirs, peer_command, with_older)]
        for results, command, environment in sides if index % 2 == 0 else reversed(sides):
            results.append(run_child(command, environment, root))
    return ours, theirs


def run_child(command: Sequence[str], environment: Mapping[str, str], root: Path) -> dict[str, Any]:
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def short_prompts(
    data: Path, model: Path, tokenizer: Any, options: argparse.Namespace, target: Path, *, is_one_length: bool = False
) -> list[list[int]]:
    """As many prompts as an iteration has, of at most --max-prompt-tokens; also written as a file of rows."""
    from collections import Counter

    from training.data.load import LoadPolicy
    from training.data.records import encode_row
    from training.prompts import read_prompts
    from training.trunk import load_chat_format

    chat_format = load_chat_format(model, tokenizer)
    assert chat_format is not None
    found = read_prompts([data], LoadPolicy(), chat_format, max_tokens=options.max_prompt_tokens)
    pairs = list(zip(found.prompts, found.ids, strict=True))
    if is_one_length:
        common = Counter(len(ids) for _, ids in pairs).most_common(1)[0][0]
        pairs = [pair for pair in pairs if len(pair[1]) == common]
    chosen = pairs[: options.rollout_size]
    target.write_bytes(b"".join(encode_row(prompt) + b"\n" for prompt, _ in chosen))
    # Fewer of one length than an iteration has: they come again, as they do on our side in the next epoch.
    return [list(chosen[index % len(chosen)][1]) for index in range(options.rollout_size)]


def random_reward_model(trunk: Path, target: Path) -> Path:
    import torch

    from quant.model_directory import hash_directory
    from training.reward_model import RewardRecord, save_reward_head

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(trunk, target)
    hidden = int(json.loads((trunk / "config.json").read_text(encoding="utf-8"))["hidden_size"])
    head = torch.randn(1, hidden, generator=torch.Generator().manual_seed(0)) / hidden**0.5
    save_reward_head(target, head, RewardRecord(0.0, 1.0, hash_directory(trunk), 1024))
    return target


def random_palm(data: Path, target: Path) -> tuple[Path, int]:
    """A PaLM of 10M random weights with a tokenizer of its own. Returns its directory and number of weights."""
    from training.data.load import LoadPolicy, load_documents
    from training.pretrain import build_model
    from training.sizes import find_size
    from training.tokenizer import train_tokenizer, write_tokenizer

    size = find_size("palm-10m")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    rows = load_documents([data / "pretrain" / "en_00.jsonl.gz"], LoadPolicy(max_rows=300)).rows
    write_tokenizer(train_tokenizer((row.text for row in rows), size.vocab), target)
    model = build_model(size, _load_tokenizer(target), 512)
    generation = (target / "generation_config.json").read_bytes()
    cast("Any", model).save_pretrained(str(target))
    (target / "generation_config.json").write_bytes(generation)
    return target, sum(parameter.numel() for parameter in model.parameters())


def record(speed: Speed) -> dict[str, Any]:
    return {**asdict(speed), "ratio": speed.ratio, "goal": GOALS[speed.part]}


def table(found: Mapping[str, Any]) -> str:
    lines = [
        "| part | beside | ours, tokens/s | theirs, tokens/s | ratio | goal |",
        "| --- | --- | --: | --: | --: | --: |",
    ]
    for part in PARTS:
        one = found.get(part)
        if one is None or part == "reward":
            continue
        ours, theirs = median(one["ours"]), median(one["theirs"])
        lines.append(
            f"| {part} | {one['peer']} | {ours:,.0f} | {theirs:,.0f} | {one['ratio']:.2f} | {one['goal']:.1f} |"
        )
    if "reward" in found:
        one = found["reward"]
        shown = [
            f"{side['value']:.1%} ({side['low']:.1%} to {side['high']:.1%})"
            for side in (one["accuracy_ours"], one["accuracy_theirs"])
        ]
        lines += ["", f"reward model, accuracy on held-out pairs: ours {shown[0]}, {one['peer']} {shown[1]}"]
    return "\n".join(lines)


def machine(threads: int) -> str:
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {threads} threads"


def _iterations(
    part: str,
    peer: str,
    ours: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
    notes: Mapping[str, Any] | None = None,
) -> Speed:
    """The first iteration of each process warms up."""
    speeds = [[median(result["tokens_per_s"][1:]) for result in side] for side in (ours, theirs)]
    seconds = {"seconds_ours": ours[0]["seconds"], "seconds_theirs": theirs[0]["seconds"]}
    return Speed(part, peer, speeds[0], speeds[1], {**seconds, **(notes or {})})


def _common(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "threads": options.threads,
        "adapter": ADAPTER,
        "optimizer": OPTIMIZER,
        "peer_defaults": options.peer_defaults,
    }


def _ppo_task(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    return {
        **_common(options, model),
        "iterations": options.iterations,
        "rollout_size": options.rollout_size,
        "micro_batch_size": min(8, options.rollout_size),
        "epochs": options.ppo_epochs,
        "max_new_tokens": options.max_new_tokens,
        "max_prompt_tokens": options.max_prompt_tokens,
    }


def _tokenizer(options: argparse.Namespace) -> tuple[Any, Path]:
    model = Path(options.model).expanduser()
    if not (model / "model.safetensors").is_file():
        raise SystemExit(f"{model} holds no weights: prepare the default model first (scripts/serve), or give --model")
    return _load_tokenizer(model), model


def _load_tokenizer(model: Path) -> Any:
    from serving.model.tokenizer import ModelTokenizer

    return ModelTokenizer.load(model)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--data", required=True, help="directory with sft/, preference/, prompts/ and pretrain/")
    parser.add_argument("--model", default=str(cache / "causerie" / "smollm2-135m-instruct" / "source"))
    parser.add_argument("--work-dir", default=str(cache / "causerie-benchmarks"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--length", type=int, default=384, help="longest row of sft and reward, in tokens")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of sft, the first to warm up")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of an sft step")
    parser.add_argument("--iterations", type=int, default=2, help="PPO iterations, the first to warm up")
    parser.add_argument("--rollout-size", type=int, default=16, help="answers of a PPO iteration")
    parser.add_argument("--ppo-epochs", type=int, default=4, help="passes over an iteration's answers (TRL's default)")
    parser.add_argument("--max-new-tokens", type=int, default=53, help="of an answer (TRL's default)")
    parser.add_argument("--max-prompt-tokens", type=int, default=96)
    parser.add_argument("--train-pairs", type=int, default=400)
    parser.add_argument("--test-pairs", type=int, default=300)
    parser.add_argument(
        "--peer-defaults",
        action="store_true",
        help="TRL as it comes: activations recomputed, and in ppo a critic whose every weight learns",
    )
    parser.add_argument("--json", metavar="FILE", help="write everything here after each part")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
