"""llama.cpp's logits of token windows: its side of `export_agreement.py`, run where llama-cpp-python is installed.

    ENV/bin/python benchmarks/export_agreement_llama_cpp.py MODEL.gguf WINDOWS.npy THREADS

WINDOWS: (count, tokens) int32 ids. For each window number read from stdin, writes (tokens, vocabulary) float32 logits
beside WINDOWS as `logits.npy` and answers with the number. Imports nothing of Causerie.
"""
# llama-cpp-python is not installed where types are checked.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np


def main(argv: list[str]) -> None:
    # llama.cpp logs to stdout as it pleases.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import llama_cpp

    model_path, windows_path, threads = argv[0], Path(argv[1]), int(argv[2])
    windows = np.load(windows_path)
    size = windows.shape[1]
    model = llama_cpp.Llama(
        model_path, n_ctx=size, n_batch=size, n_ubatch=size, n_threads=threads, logits_all=True, verbose=False
    )
    for line in sys.stdin:
        model.reset()
        model.eval(windows[int(line)].tolist())
        np.save(windows_path.with_name("logits.npy"), model.scores[:size])
        answers.write(line)


if __name__ == "__main__":
    main(sys.argv[1:])
