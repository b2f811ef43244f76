"""How closely llama.cpp follows our engine on an exported model: KL divergence, top-1 agreement, perplexity.

    python -m benchmarks.export_agreement MODEL_DIRECTORY --llama-cpp-python ENV/bin/python

Exports the directory to GGUF and takes the logits of every held-out token three times: llama.cpp's, our plain path's
(float32 on the dequantised weights) and our serving path's. ENV has llama-cpp-python and numpy. Exits with 1 where
mean KL or top-1 agreement misses its bound.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import tempfile
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quant.calibration import BUNDLED_HELD_OUT, bundled_rows, encode_rows, held_out_windows
from quant.commands import ServingAccess
from quant.export import Embeddings, export_gguf
from quant.progress import SilentProgress
from serving.engine.logits import serving_logits
from serving.engine.prepare import prepare
from serving.model.chat_template import find_template
from serving.model.weights import load_decoder

WORKER = Path(__file__).with_name("export_agreement_llama_cpp.py")
WindowLogits = Callable[[int], Tensor]
"""window number -> (tokens, vocabulary) float32."""


@dataclass(slots=True)
class Distances:
    """Of llama.cpp's predictions from ours, KL(ours || llama.cpp) in nats, one entry a token."""

    kl: list[float] = field(default_factory=list[float])
    is_same_top: list[bool] = field(default_factory=list[bool])

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """ours, theirs: (tokens, vocabulary) log probabilities."""
        self.kl += ((ours - theirs) * ours.exp()).sum(1).clamp_min(0).tolist()
        self.is_same_top += (ours.argmax(1) == theirs.argmax(1)).tolist()

    def row(self) -> dict[str, float]:
        return {
            "mean_kl": float(np.mean(self.kl)),
            "kl_p99": float(np.quantile(self.kl, 0.99)),
            "top1_agreement": float(np.mean(self.is_same_top)),
            "tokens": len(self.kl),
        }


@dataclass(frozen=True, slots=True)
class Options:
    model: Path
    llama_cpp_python: Path
    tokens: int
    window: int
    threads: int
    embeddings: Embeddings
    float16_bits: tuple[int, ...]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_DIRECTORY")
    parser.add_argument("--llama-cpp-python", type=Path, required=True, metavar="PYTHON")
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
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    options = Options(
        model=given.model,
        llama_cpp_python=given.llama_cpp_python,
        tokens=given.tokens,
        window=given.window,
        threads=given.threads,
        embeddings=Embeddings(given.embeddings),
        float16_bits=tuple(given.float16_bits),
    )
    rows = measure(options)
    for name, row in rows.items():
        print(f"{name:<14}", "  ".join(f"{key} {value:.6g}" for key, value in row.items()))
    if given.json is not None:
        record = {"options": {key: str(value) for key, value in asdict(options).items()}, **rows}
        given.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    compared = (rows["plain"], rows["served"])
    holds = all(
        row["mean_kl"] <= given.max_mean_kl and row["top1_agreement"] >= given.min_top1_agreement for row in compared
    )
    return 0 if holds else 1


def measure(options: Options) -> dict[str, dict[str, float]]:
    """Rows: llama.cpp against our `plain` and our `served` path, the two paths against each other, perplexities."""
    access = ServingAccess()
    ids = encode_rows(bundled_rows(BUNDLED_HELD_OUT), access.encoder(options.model))
    windows = held_out_windows(ids, options.window, options.tokens)
    plain = load_decoder(options.model, dtype=torch.float32)
    served = prepare(load_decoder(options.model, dtype=torch.bfloat16), exact=False)
    distances = {name: Distances() for name in ("plain", "served", "plain-served")}
    losses: dict[str, float] = {"llama_cpp": 0.0, "plain": 0.0, "served": 0.0}
    with torch.inference_mode(), _llama_cpp(options, windows) as llama_cpp_logits:
        for index, window in enumerate(windows):
            logs = {
                "llama_cpp": llama_cpp_logits(index),
                "plain": plain(window[None])[0],
                "served": serving_logits(served, window),
            }
            logs = {name: torch.log_softmax(logits.float(), dim=1) for name, logits in logs.items()}
            distances["plain"].add(logs["plain"], logs["llama_cpp"])
            distances["served"].add(logs["served"], logs["llama_cpp"])
            distances["plain-served"].add(logs["plain"], logs["served"])
            for name, log_probs in logs.items():
                losses[name] -= float(log_probs[:-1].gather(1, window[1:, None]).mean()) / len(windows)
    perplexity = {name: float(np.exp(loss)) for name, loss in losses.items()}
    return {**{name: found.row() for name, found in distances.items()}, "perplexity": perplexity}


@contextlib.contextmanager
def _llama_cpp(options: Options, windows: Tensor) -> Generator[WindowLogits]:
    """llama.cpp on the exported model, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        gguf, windows_path = Path(folder) / "model.gguf", Path(folder) / "windows.npy"
        template = find_template(options.model)
        export_gguf(
            options.model,
            gguf,
            SilentProgress(),
            chat_template=template,
            embeddings=options.embeddings,
            float16_bits=options.float16_bits,
        )
        np.save(windows_path, windows.numpy().astype(np.int32))
        command = [str(options.llama_cpp_python), str(WORKER), str(gguf), str(windows_path), str(options.threads)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdin is not None
            assert worker.stdout is not None

            def logits(index: int) -> Tensor:
                assert worker.stdin is not None
                assert worker.stdout is not None
                worker.stdin.write(f"{index}\n")
                worker.stdin.flush()
                if not worker.stdout.readline():
                    raise RuntimeError(f"llama.cpp's process ended with code {worker.wait()}")
                return torch.from_numpy(np.load(windows_path.with_name("logits.npy")))

            yield logits
            worker.stdin.close()


if __name__ == "__main__":
    raise SystemExit(main())
