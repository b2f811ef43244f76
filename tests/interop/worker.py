"""Other tools' side of test_files.py, run in their environments; imports nothing of Causerie.

    ENV/bin/python tests/interop/worker.py load-gptqmodel|load-vllm|quantize-gptqmodel TASK.json

`load`: for each directory of the task, `NAME.safetensors` with the log-probabilities of every token after each of
`ids`, or `NAME.txt` with why it does not load. `quantize`: writes the task's cases with the tool itself.
"""
# The tools are not installed where types are checked.
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# See benchmarks/quantize_peer.py.
FEWEST_PROCESSORS = 4


def main(argv: list[str]) -> None:
    kind, path = argv
    task = json.loads(Path(path).read_text(encoding="utf-8"))
    if kind == "quantize-gptqmodel":
        quantize_with_gptqmodel(task)
        return
    load = {"load-gptqmodel": log_probabilities_of_gptqmodel, "load-vllm": log_probabilities_of_vllm}[kind]
    from safetensors.torch import save_file

    for directory in map(Path, task["directories"]):
        target = Path(task["results"]) / directory.name
        try:
            save_file({"logprobs": load(directory, task["ids"])}, f"{target}.safetensors")
        except Exception as error:  # every refusal is an answer here
            Path(f"{target}.txt").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")


def _gptqmodel() -> Any:
    processors = max(os.cpu_count() or 1, FEWEST_PROCESSORS)
    os.cpu_count = lambda: processors
    import gptqmodel

    return gptqmodel


def log_probabilities_of_gptqmodel(directory: Path, ids: list[list[int]]) -> Any:
    gptqmodel = _gptqmodel()
    import torch

    model = gptqmodel.GPTQModel.load(str(directory), device="cpu", backend=gptqmodel.BACKEND.TORCH, dtype=torch.float16)
    with torch.no_grad():
        logits = model.model(torch.tensor(ids)).logits
    return logits.float().log_softmax(-1).contiguous()


def log_probabilities_of_vllm(directory: Path, ids: list[list[int]]) -> Any:
    import torch
    from vllm import LLM, SamplingParams, TokensPrompt

    vocabulary = json.loads((directory / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    llm = LLM(
        model=str(directory),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=128,
        max_logprobs=vocabulary,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=vocabulary, detokenize=False)
    found = []
    for output in llm.generate([TokensPrompt(prompt_token_ids=row) for row in ids], sampling, use_tqdm=False):
        rows = [[row[token].logprob for token in range(vocabulary)] for row in output.prompt_logprobs[1:]]
        found.append(rows)
    return torch.tensor(found)


def quantize_with_gptqmodel(task: dict[str, Any]) -> None:
    gptqmodel = _gptqmodel()
    import torch
    from safetensors.torch import save_file

    calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in task["calibration"]]
    for name, settings in task["cases"].items():
        out = Path(task["results"]) / name
        try:
            config = gptqmodel.QuantizeConfig(**settings)
            model = gptqmodel.GPTQModel.load(task["source"], config, device="cpu", dtype=torch.float16)
            model.quantize(calibration, batch_size=1)
            model.save(str(out))
            save_file({"logprobs": log_probabilities_of_gptqmodel(out, task["ids"])}, f"{out}.safetensors")
        except Exception as error:
            Path(f"{out}.txt").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
