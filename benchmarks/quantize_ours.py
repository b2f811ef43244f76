"""Causerie's side of benchmarks/quantize.py: quantises a directory in a process of its own.

    python -m benchmarks.quantize_ours TASK.json

The same task as `quantize_peer.py`. The last line is JSON: seconds by stage.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main(argv: list[str]) -> None:
    from quant.threads import wait_without_spinning_long

    wait_without_spinning_long(os.environ)  # as `causerie quantize` does

    import torch
    from safetensors.torch import load_file

    from quant.commands import ServingAccess
    from quant.formats.autogptq import read_json
    from quant.formats.autogptq_writer import write_checkpoint
    from quant.formats.checkpoint_format import CheckpointFormat
    from quant.formats.checkpoint_names import checkpoint_names
    from quant.heap import large_blocks_given_back
    from quant.method.gptq import ActOrder, GptqOptions
    from quant.options import LinearChoice
    from quant.progress import LineProgress
    from quant.walk.layer_files import WorkDirectory
    from quant.walk.layer_walk import quantize_to_disk

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
    layers = ServingAccess().open(source)
    calibration = load_file(task["calibration"])["ids"]
    marks.append(time.monotonic())
    choice = LinearChoice(options.bits, options.group_size)
    (out / "work").mkdir(parents=True)
    work = WorkDirectory(out / "work", checkpoint_names(read_json(source / "config.json")), CheckpointFormat.V1)
    with large_blocks_given_back():  # as `quantize_with` does
        quantize_to_disk(layers, calibration, options, lambda _: choice, work, LineProgress(sys.stderr))
    marks.append(time.monotonic())
    files = [work.file(index) for index in range(layers.num_layers)]
    choices = {name: choice for index in range(layers.num_layers) for name in work.choices(index)}
    write_checkpoint(source, out, files, choices, options)
    marks.append(time.monotonic())
    stages = {
        name: end - start for name, start, end in zip(("load", "quantize", "save"), marks[:-1], marks[1:], strict=True)
    }
    print(json.dumps(stages))


if __name__ == "__main__":
    main(sys.argv[1:])
