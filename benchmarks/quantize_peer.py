"""GPTQModel's side of benchmarks/quantize.py, run in its own environment: quantises a directory on the CPU.

    ENV/bin/python benchmarks/quantize_peer.py TASK.json

The task: source, out, calibration (safetensors with `ids`), bits, group_size, symmetric, act_order, threads. Its last
line is JSON: seconds by stage. Imports nothing of Causerie.
"""
# GPTQModel is not installed where types are checked.
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

# Its thread pool counts processors at import and stops where there are fewer than this ("requests 2 workers but
# parent 'cpu' only has 1"). Its products still run on as many threads as the task says.
FEWEST_PROCESSORS = 4


def main(argv: list[str]) -> None:
    task = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    processors = max(os.cpu_count() or 1, FEWEST_PROCESSORS)
    os.cpu_count = lambda: processors
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from safetensors.torch import load_file

    torch.set_num_threads(task["threads"])
    windows = load_file(task["calibration"])["ids"].tolist()
    calibration = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows]
    config = QuantizeConfig(
        bits=task["bits"], group_size=task["group_size"], sym=task["symmetric"], desc_act=task["act_order"]
    )
    marks = [time.monotonic()]
    model = GPTQModel.load(task["source"], config, device="cpu")
    marks.append(time.monotonic())
    model.quantize(calibration, batch_size=1)
    marks.append(time.monotonic())
    model.save(task["out"])
    marks.append(time.monotonic())
    stages = {
        name: end - start for name, start, end in zip(("load", "quantize", "save"), marks[:-1], marks[1:], strict=True)
    }
    print(json.dumps(stages))


if __name__ == "__main__":
    main(sys.argv[1:])
