"""Quantisers side by side in one run: `causerie quantize`'s walk and GPTQModel, on the same weights and tokens.

    python -m benchmarks.quantize --data DIRECTORY --work WORK --json OUT.json

The weights are the default model's with 1 % of random noise: as distributed they lie on a 4-bit grid, which would
flatter asymmetric groups. Both sides get the same token windows, run one after the other in processes of their own, and
are judged by one perplexity: transformers' model with the weights that `quant.formats.autogptq_check`, which shares no
code with either writer, reads from their files. DIRECTORY holds ppl_wikitext2_{valid,test}.txt.gz.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.quantizer_setup import GPTQMODEL, make_gptqmodel
from quant.formats.autogptq_check import stored_weight

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "model.safetensors"
# Rows of logits in float32 at once: a vocabulary of 49,152 takes 25 MB.
LOGIT_ROWS = 128


@dataclass(frozen=True, slots=True)
class Side:
    """What one quantiser took and left. `seconds` and `peak_bytes` of its whole process, `stages` by its own clock."""

    name: str
    seconds: float
    peak_bytes: int
    stages: Mapping[str, float]
    file_bytes: int
    perplexity: float


@dataclass(frozen=True, slots=True)
class Comparison:
    source_perplexity: float
    ours: Side
    peer: Side | None
    settings: Mapping[str, object]

    def increase(self, side: Side) -> float:
        """In percent."""
        return 100.0 * (side.perplexity / self.source_perplexity - 1.0)

    def ratios(self) -> dict[str, float]:
        """Ours over the peer's: below 1 is better."""
        if self.peer is None:
            return {}
        return {
            "perplexity_increase": self.increase(self.ours) / self.increase(self.peer),
            "seconds": self.ours.seconds / self.peer.seconds,
            "peak_memory": self.ours.peak_bytes / self.peer.peak_bytes,
        }


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    source = noisy_source(_plain_source(), work / f"source-noise-{options.noise:g}", options.noise)
    calibration, test = token_windows(options, source, work)
    task = {
        "source": str(source),
        "calibration": str(calibration),
        "bits": options.bits,
        "group_size": options.group_size,
        "symmetric": not options.asym,
        "act_order": False,
        "our_act_order": options.our_act_order,
        "threads": options.threads,
    }
    ours = run_side("causerie", [sys.executable, "-m", "benchmarks.quantize_ours"], task, work, test)
    peer = None
    if not options.no_peer:
        worker = [make_gptqmodel(work), ROOT / "benchmarks" / "quantize_peer.py"]
        peer = run_side(f"GPTQModel {GPTQMODEL}", worker, task, work, test)
    settings = {**task, "noise": options.noise, "test_tokens": test.numel(), "machine": platform.processor()}
    comparison = Comparison(perplexity(source, source, test), ours, peer, settings)
    print(table(comparison))
    if options.json is not None:
        record = {**asdict(comparison), "ratios": comparison.ratios()}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


def noisy_source(plain: Path, target: Path, share: float) -> Path:
    """A copy of the model directory whose matrices carry normal noise, `share` of each one's standard deviation."""
    if target.exists():
        return target
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(plain, partial)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(plain / WEIGHTS)
    for name in sorted(tensors):
        values = tensors[name].to(torch.float32)
        if values.dim() == 2:
            values += torch.randn(values.shape, generator=generator) * values.std() * share
            tensors[name] = values.to(tensors[name].dtype)
    save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
    partial.rename(target)
    return target


def token_windows(options: argparse.Namespace, source: Path, work: Path) -> tuple[Path, Tensor]:
    """A file with the calibration windows as `ids`, and the test windows; (windows, tokens) each."""
    calibration = _windows(source, options.data / "ppl_wikitext2_valid.txt.gz", options.seq_len)[: options.samples]
    if calibration.shape[0] < options.samples:
        raise SystemExit(f"the text holds {calibration.shape[0]} windows; --samples asks for {options.samples}")
    path = work / "calibration.safetensors"
    save_file({"ids": calibration.contiguous()}, path)
    test = _windows(source, options.data / "ppl_wikitext2_test.txt.gz", options.seq_len)
    return path, test[: math.ceil(options.test_tokens / options.seq_len)] if options.test_tokens else test


def _windows(source: Path, text: Path, length: int) -> Tensor:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    ids = tokenizer.encode(gzip.decompress(text.read_bytes()).decode("utf-8"), add_special_tokens=False).ids
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def run_side(name: str, worker: Sequence[str | Path], task: Mapping[str, object], work: Path, test: Tensor) -> Side:
    """Quantise in a process of its own and judge what it wrote. The memory is the process's largest resident set."""
    out = work / f"out-{name.split()[0].lower()}"
    shutil.rmtree(out, ignore_errors=True)
    task_file = out.with_suffix(".json")
    task_file.write_text(json.dumps({**task, "out": str(out)}), encoding="utf-8")
    print(f"quantising with {name}", file=sys.stderr)
    started = time.monotonic()
    # Ours is found as a module from the root; GPTQModel leaves its logs where it runs.
    folder = ROOT if "-m" in worker else work
    process = subprocess.Popen([*worker, task_file], cwd=folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    if status:
        raise SystemExit(f"{name} failed with {os.waitstatus_to_exitcode(status)}")
    return Side(
        name=name,
        seconds=seconds,
        peak_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        stages=json.loads(printed.strip().splitlines()[-1]),
        file_bytes=sum(path.stat().st_size for path in out.glob("*.safetensors")),
        perplexity=perplexity(Path(str(task["source"])), out, test),
    )


def perplexity(source: Path, directory: Path, windows: Tensor) -> float:
    """Of transformers' model in bfloat16 products with the weights of `directory`, quantised or not, on `windows`.

    windows: (windows, tokens) ids; every token but a window's first is predicted.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    weights = dequantised(directory)
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
        total = sum(_negative_log_likelihood(model(window[None]).logits[0, :-1], window[1:]) for window in windows)
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """Summed, computed in float32. logits: (tokens, vocabulary); targets: (tokens,)."""
    parts = zip(logits.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    return sum(float(torch.nn.functional.cross_entropy(rows.float(), ids, reduction="sum")) for rows, ids in parts)


def dequantised(directory: Path) -> dict[str, Tensor]:
    """Every weight of a model directory by its plain name, packed linears unpacked by independent code."""
    weights: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the handle is not iterable
                stem, _, part = name.rpartition(".")
                if part == "qweight":
                    weights[f"{stem}.weight"] = torch.from_numpy(stored_weight(path, stem))
                elif part not in ("qzeros", "scales", "g_idx"):
                    weights[name] = file.get_tensor(name)
    return weights


def table(comparison: Comparison) -> str:
    sides = [side for side in (comparison.ours, comparison.peer) if side is not None]
    lines = [
        "| quantiser | perplexity | increase | time | peak memory | file |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    lines.append(f"| source | {comparison.source_perplexity:.3f} | | | | |")
    for side in sides:
        lines.append(
            f"| {side.name} | {side.perplexity:.3f} | {comparison.increase(side):+.2f} % | {side.seconds:.0f} s | "
            f"{side.peak_bytes / 1e6:,.0f} MB | {side.file_bytes / 1e6:,.0f} MB |"
        )
    ratios = comparison.ratios()
    if ratios:
        lines.append(
            f"| ours / peer's | | {ratios['perplexity_increase']:.2f} | {ratios['seconds']:.2f} | "
            f"{ratios['peak_memory']:.2f} | |"
        )
    return "\n".join(lines)


def _plain_source() -> Path:
    from quant.progress import LineProgress
    from serving.models import DEFAULT_MODEL, cache_directory
    from serving.preparation import prepare_source

    return prepare_source(DEFAULT_MODEL, cache_directory(os.environ), LineProgress(sys.stderr))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of ppl_wikitext2_{valid,test}.txt.gz")
    parser.add_argument("--work", type=Path, required=True, help="folder for sources, results and environments")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument(
        "--our-act-order", choices=("none", "static"), default="static", help="both leave g_idx trivial"
    )
    parser.add_argument("--noise", type=float, default=0.01, help="share of each matrix's standard deviation (0.01)")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--test-tokens", type=int, help="at most so many of the test text (default: all)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-peer", action="store_true", help="only this project's side")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
