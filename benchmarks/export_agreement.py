"""How closely llama.cpp follows our engine on an exported model: KL divergence, top-1 agreement, perplexity.

    python -m benchmarks.export_agreement MODEL_DIRECTORY --llama-cpp-python ENV/bin/python [--build blas=DIR]

Exports the directory to GGUF and takes the logits of every held-out token from llama.cpp and three times from here: our
plain path (float32 on the dequantised weights, as `serve --exact`), our serving path, and the plain path with the
activations rounded as llama.cpp's own products round them. ENV has llama-cpp-python and numpy; `--build` names folders
with other builds of its libraries, as one with GGML_BLAS=ON and GGML_CPU_REPACK=OFF, which multiplies prompts in
float32. Exits with 1 where no build keeps both bounds against a path of ours that `serve` has.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from quant.commands import ServingAccess
from quant.convert.export import Embeddings, export_gguf
from quant.formats.gguf_blocks import BLOCK
from quant.int4_linear import QuantizedLinear
from quant.progress import SilentProgress
from quant.run.calibration import BUNDLED_HELD_OUT, bundled_rows, encode_rows, held_out_windows
from serving.engine.logits import serving_logits
from serving.engine.prepare import prepare
from serving.model.chat_template import find_template
from serving.model.transformer import Decoder
from serving.model.weights import load_decoder

WORKER = Path(__file__).with_name("export_agreement_llama_cpp.py")
LIBRARIES_VARIABLE = "LLAMA_CPP_LIB_PATH"
DEFAULT_BUILD = "llama.cpp"
PLAIN, SERVED, ROUNDED = "plain", "served", "plain, 8-bit activations"
Row = dict[str, float]
WindowLogits = Callable[[int], Tensor]
"""window number -> (tokens, vocabulary) float32."""


@dataclass(slots=True)
class Distances:
    """Of one side's predictions from the other's, KL(first || second) in nats, one entry a token."""

    kl: list[float] = field(default_factory=list[float])
    is_same_top: list[bool] = field(default_factory=list[bool])

    def add(self, first: Tensor, second: Tensor) -> None:
        """first, second: (tokens, vocabulary) log probabilities."""
        self.kl += ((first - second) * first.exp()).sum(1).clamp_min(0).tolist()
        self.is_same_top += (first.argmax(1) == second.argmax(1)).tolist()

    def row(self) -> Row:
        return {
            "mean_kl": float(np.mean(self.kl)),
            "kl_p99": float(np.quantile(self.kl, 0.99)),
            "top1_agreement": float(np.mean(self.is_same_top)),
            "tokens": len(self.kl),
        }


@dataclass(frozen=True, slots=True)
class Options:
    """`builds`: folders with llama.cpp's libraries by the name to print; None is what llama-cpp-python brings."""

    model: Path
    llama_cpp_python: Path
    builds: Mapping[str, Path | None]
    tokens: int
    window: int
    threads: int
    embeddings: Embeddings
    float16_bits: tuple[int, ...]


def main(argv: list[str] | None = None) -> int:
    given = _parse(argv)
    torch.set_num_threads(given.threads)
    options = Options(
        model=given.model,
        llama_cpp_python=given.llama_cpp_python,
        builds={DEFAULT_BUILD: None, **dict(given.build)},
        tokens=given.tokens,
        window=given.window,
        threads=given.threads,
        embeddings=Embeddings(given.embeddings),
        float16_bits=tuple(given.float16_bits),
    )
    distances, perplexities = measure(options)
    for name, row in distances.items():
        print(f"{name:<44}", "  ".join(f"{key} {value:.6g}" for key, value in row.items()))
    print("perplexity:", "  ".join(f"{name} {value:.5g}" for name, value in perplexities.items()))
    if given.json is not None:
        record = {"options": {key: str(value) for key, value in asdict(options).items()}, "distances": distances}
        given.json.write_text(json.dumps({**record, "perplexity": perplexities}, indent=2) + "\n", encoding="utf-8")
    compared = [distances[_pair(path, build)] for path in (PLAIN, SERVED) for build in options.builds]
    holds = any(
        row["mean_kl"] <= given.max_mean_kl and row["top1_agreement"] >= given.min_top1_agreement for row in compared
    )
    return 0 if holds else 1


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_DIRECTORY")
    parser.add_argument("--llama-cpp-python", type=Path, required=True, metavar="PYTHON")
    parser.add_argument("--build", type=_named_folder, action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512, help="tokens of one context")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--embeddings", choices=tuple(Embeddings), default=Embeddings.AS_STORED)
    parser.add_argument(
        "--float16-bits", type=int, nargs="*", default=(), help="linears of so many bits as F16: what their type costs"
    )
    parser.add_argument("--max-mean-kl", type=float, default=0.01)
    parser.add_argument("--min-top1-agreement", type=float, default=0.98)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def _named_folder(text: str) -> tuple[str, Path]:
    name, sign, folder = text.partition("=")
    if not sign or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR with a folder that exists")
    return name, Path(folder)


def measure(options: Options) -> tuple[dict[str, Row], dict[str, float]]:
    """The distance of each pair of sides by their names, and the perplexity of each side."""
    ids = encode_rows(bundled_rows(BUNDLED_HELD_OUT), ServingAccess().encoder(options.model))
    windows = held_out_windows(ids, options.window, options.tokens)
    plain = load_decoder(options.model, dtype=torch.float32)
    rounding = load_decoder(options.model, dtype=torch.float32)
    round_activations(rounding, options.float16_bits)
    served = prepare(load_decoder(options.model, dtype=torch.bfloat16), exact=False)
    sides: dict[str, WindowLogits] = {
        PLAIN: lambda index: plain(windows[index][None])[0],
        SERVED: lambda index: serving_logits(served, windows[index]),
        ROUNDED: lambda index: rounding(windows[index][None])[0],
    }
    with torch.inference_mode(), _llama_cpp(options, windows) as builds:
        return compare({**sides, **builds}, windows)


def compare(sides: Mapping[str, WindowLogits], windows: Tensor) -> tuple[dict[str, Row], dict[str, float]]:
    """windows: (count, tokens) ids. Every pair of sides, in their order."""
    pairs = list(itertools.combinations(sides, 2))
    distances = {_pair(*pair): Distances() for pair in pairs}
    losses = dict.fromkeys(sides, 0.0)
    for index, window in enumerate(windows):
        logs = {name: torch.log_softmax(logits(index).float(), dim=1) for name, logits in sides.items()}
        for first, second in pairs:
            distances[_pair(first, second)].add(logs[first], logs[second])
        for name, log_probs in logs.items():
            losses[name] -= float(log_probs[:-1].gather(1, window[1:, None]).mean()) / len(windows)
    return {name: found.row() for name, found in distances.items()}, {
        name: float(np.exp(loss)) for name, loss in losses.items()
    }


def _pair(first: str, second: str) -> str:
    return f"{first} / {second}"


def round_activations(decoder: Decoder, float16_bits: Sequence[int]) -> None:
    """Round what goes into every quantised linear as llama.cpp's CPU products do: to Q8_0 blocks.

    float16_bits: linears of so many bits are F16 in the file, so they are left alone
    """

    def rounded(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor]:
        return (as_q8_0(inputs[0]),)

    for module in decoder.modules():
        if isinstance(module, QuantizedLinear) and module.matrix.bits not in float16_bits:
            module.register_forward_pre_hook(rounded)


def as_q8_0(values: Tensor) -> Tensor:
    """The values that Q8_0 holds: codes of 8 bits, a float16 scale for each block of 32 along the last axis.

    values: (..., n) float32, n a multiple of 32. Returns the same shape.
    """
    blocks = values.unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scales > 0, blocks / scales, 0.0).round()
    return (codes * scales.half().float()).flatten(-2)


@contextlib.contextmanager
def _llama_cpp(options: Options, windows: Tensor) -> Generator[dict[str, WindowLogits]]:
    """Each of its builds on the exported model, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        gguf = Path(folder) / "model.gguf"
        export_gguf(
            options.model,
            gguf,
            SilentProgress(),
            chat_template=find_template(options.model),
            embeddings=options.embeddings,
            float16_bits=options.float16_bits,
        )
        yield {
            name: stack.enter_context(_worker(options, gguf, Path(folder) / f"build-{number}", libraries, windows))
            for number, (name, libraries) in enumerate(options.builds.items())
        }


@contextlib.contextmanager
def _worker(
    options: Options, gguf: Path, folder: Path, libraries: Path | None, windows: Tensor
) -> Generator[WindowLogits]:
    """`folder` is made here."""
    folder.mkdir()
    np.save(folder / "windows.npy", windows.numpy().astype(np.int32))
    command = [str(options.llama_cpp_python), WORKER, gguf, folder / "windows.npy", str(options.threads)]
    environment = dict(os.environ)
    if libraries is not None:
        environment[LIBRARIES_VARIABLE] = str(libraries.absolute())
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as worker:

        def logits(index: int) -> Tensor:
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write(f"{index}\n")
            worker.stdin.flush()
            if not worker.stdout.readline():
                raise RuntimeError(f"llama.cpp's process ended with code {worker.wait()}")
            return torch.from_numpy(np.load(folder / "logits.npy"))

        yield logits
        assert worker.stdin is not None
        worker.stdin.close()


if __name__ == "__main__":
    raise SystemExit(main())
