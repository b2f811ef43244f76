"""Sets up the quantisers and engines that files are exchanged with, each once, in an environment of its own.

    python -m benchmarks.quantizer_setup WORK [gptqmodel] [auto-gptq] [vllm]

GPTQModel is the peer of `benchmarks/quantize.py`; `tests/interop` loads files in all of them. `WORK` is what
`CAUSERIE_INTEROP` then names. What cannot be set up raises PeerUnavailableError.
"""

from __future__ import annotations

import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.peer_setup import PeerUnavailableError, make_vllm, run
from benchmarks.training import torch_arguments

GPTQMODEL, AUTO_GPTQ = "7.7.0", "0.7.1"
# What auto-gptq was released against. Its wheel names CUDA's libraries; nothing here needs a GPU.
AUTO_GPTQ_NEEDS = ("torch==2.2.2", "numpy<2", "transformers==4.38.2", "accelerate==0.27.2", "peft==0.9.0")
AUTO_GPTQ_ALSO_NEEDS = ("datasets==2.18.0", "pyarrow==15.0.2", "sentencepiece", "rouge", "gekko", "safetensors", "tqdm")


def make_gptqmodel(work: Path) -> Path:
    """The Python of an environment with GPTQModel; some 6 GB, minutes on the first run."""
    return _make(work / "gptqmodel", f"GPTQModel {GPTQMODEL}", [[*torch_arguments()], [f"gptqmodel=={GPTQMODEL}"]])


def make_auto_gptq(work: Path) -> Path:
    """The Python of an environment with the last auto-gptq and the torch of its time; some 5 GB."""
    installs = [[*AUTO_GPTQ_NEEDS, *AUTO_GPTQ_ALSO_NEEDS], ["--no-deps", f"auto-gptq=={AUTO_GPTQ}"]]
    return _make(work / "auto-gptq", f"auto-gptq {AUTO_GPTQ}", installs)


def _make(environment: Path, name: str, installs: Sequence[Sequence[str]]) -> Path:
    python, finished = environment / "bin" / "python", environment / "finished"
    if finished.exists():
        return python
    print(f"installing {name} and what it needs: minutes", file=sys.stderr)
    venv.create(environment, with_pip=True)
    for arguments in installs:
        run([python, "-m", "pip", "install", "--quiet", *arguments])
    finished.touch()
    return python


MAKERS: Mapping[str, Callable[[Path], Path]] = {
    "gptqmodel": make_gptqmodel,
    "auto-gptq": make_auto_gptq,
    "vllm": make_vllm,
}


def main(argv: Sequence[str]) -> int:
    if not argv or any(name not in MAKERS for name in argv[1:]):
        print(f"usage: python -m benchmarks.quantizer_setup WORK [{'] ['.join(MAKERS)}]", file=sys.stderr)
        return 2
    work = Path(argv[0]).absolute()
    failed = False
    for name in argv[1:] or list(MAKERS):
        try:
            print(f"{name}: {MAKERS[name](work)}")
        except PeerUnavailableError as error:
            failed = True
            print(f"{name}: cannot be set up: {error}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
