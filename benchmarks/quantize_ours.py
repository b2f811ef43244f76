"""Causerie's side of benchmarks/quantize.py: quantises a directory in a process of its own.

    python -m benchmarks.quantize_ours TASK.json

The same task as `quantize_peer.py`. The last line is JSON: seconds by stage.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(argv: list[str]) -> None:
    import torch
    from safetensors.torch import load_file

    from quant.commands import stored_dtype
    from quant.formats.autogptq_writer import write_checkpoint
    from quant.gptq import ActOrder, GptqOptions
    from quant.progress import LineProgress
    from quant.quantize_directory import quantized_matrices
    from quant.quantize_model import quantize_layers
    from serving.model.weights import load_decoder

    task = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    torch.set_num_threads(task["threads"])
    source, out = Path(task["source"]), Path(task["out"])
    options = GptqOptions(
        bits=task["bits"],
        group_size=task["group_size"],
        symmetric=task["symmetric"],
        act_order=ActOrder(task["our_act_order"]),
    )
    marks = [time.monotonic()]
    model = load_decoder(source, dtype=stored_dtype(source))
    calibration = load_file(task["calibration"])["ids"]
    marks.append(time.monotonic())
    quantize_layers(model, calibration, options, LineProgress(sys.stderr))
    marks.append(time.monotonic())
    out.mkdir(parents=True)
    write_checkpoint(source, out, quantized_matrices(model), options, task["group_size"])
    marks.append(time.monotonic())
    stages = {
        name: end - start for name, start, end in zip(("load", "quantize", "save"), marks[:-1], marks[1:], strict=True)
    }
    print(json.dumps(stages))


if __name__ == "__main__":
    main(sys.argv[1:])
