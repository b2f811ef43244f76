"""How much memory `causerie quantize` takes on a checkpoint that would not fit as a whole.

    python -m benchmarks.quantize_memory                      a Llama of 1.5 billion parameters with random weights
    python -m benchmarks.quantize_memory --plan --layers 32 --hidden 4096 --inner 14336 --heads 32 --kv-heads 8 \\
        --vocab 128256 --samples 128                          what 8 billion would take: nothing is quantised

Writes the checkpoint layer by layer, quantises it in a process of its own and compares that one's peak with its plan
and with the bound: 1.5 x (largest layer's weights as stored + its Hessians + calibration activations) + 1 GB. What is
computed with random weights means nothing; only memory and time do. Needs no network.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GIGABYTE = 10**9


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a Llama with bf16 weights and a tied head."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of a layer's linears."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }

    @property
    def files(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The tensors of each file, with their shapes."""
        files: dict[str, dict[str, tuple[int, ...]]] = {}
        files["ends.safetensors"] = {
            "model.embed_tokens.weight": (self.vocab, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        for index in range(self.layers):
            prefix = f"model.layers.{index}"
            files[f"layer-{index:05d}.safetensors"] = {
                **{f"{prefix}.{name}.weight": size for name, size in self.linears.items()},
                **{
                    f"{prefix}.{name}.weight": (self.hidden,)
                    for name in ("input_layernorm", "post_attention_layernorm")
                },
            }
        return files

    @property
    def layer_parameters(self) -> int:
        return sum(outputs * inputs for outputs, inputs in self.linears.values()) + 2 * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + (self.vocab + 1) * self.hidden

    def bound_bytes(self, tokens: int) -> float:
        """tokens: of calibration. Both Hessians that differ in size, and activations at a layer's widest place."""
        weights = 2 * self.layer_parameters
        hessians = 4 * (self.hidden**2 + self.inner**2)
        activations = 2 * tokens * (self.hidden + self.inner)
        return 1.5 * (weights + hessians + activations) + GIGABYTE


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=5632)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--plan", action="store_true", help="only the plan, from a checkpoint of headers and holes")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--worker", nargs=2, metavar=("SOURCE", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        return _work(Path(options.worker[0]), Path(options.worker[1]), options.samples, options.seq_len)
    shape = Shape(options.layers, options.hidden, options.inner, options.heads, options.kv_heads, options.vocab)
    look = plan_only if options.plan else measure
    with tempfile.TemporaryDirectory() as folder:
        record = look(shape, options.samples, options.seq_len, Path(folder))
    for name, value in record.items():
        print(f"{name:<24} {value:>18,.2f}")
    if options.json:
        Path(options.json).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0 if record["planned_over_bound" if options.plan else "peak_over_bound"] <= 1 else 1


def plan_only(shape: Shape, samples: int, seq_len: int, folder: Path) -> dict[str, float]:
    """Prints the plan as `causerie quantize --plan` does."""
    from quant.options import QuantizeOptions
    from quant.run.plan import plan_run
    from serving.model.layer_source import DirectoryLayers

    write_hollow_checkpoint(folder / "source", shape)
    options = QuantizeOptions(samples=samples, seq_len=seq_len)
    plan = plan_run(DirectoryLayers(folder / "source"), options, folder / "out")
    print("\n".join(plan.lines))
    bound = shape.bound_bytes(samples * seq_len)
    return {
        "parameters": shape.parameters,
        "calibration_tokens": samples * seq_len,
        "bound_bytes": bound,
        "planned_bytes": plan.peak_memory_bytes,
        "planned_over_bound": plan.peak_memory_bytes / bound,
        "planned_seconds": plan.seconds,
    }


def measure(shape: Shape, samples: int, seq_len: int, folder: Path) -> dict[str, float]:
    write_random_checkpoint(folder / "source", shape)
    command = [sys.executable, "-m", "benchmarks.quantize_memory", "--samples", str(samples), "--seq-len", str(seq_len)]
    worker = [*command, "--worker", str(folder / "source"), str(folder / "out")]
    started = time.monotonic()
    printed = subprocess.run(worker, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds = time.monotonic() - started
    result = json.loads(printed.splitlines()[-1])
    bound = shape.bound_bytes(samples * seq_len)
    return {
        "parameters": shape.parameters,
        "calibration_tokens": samples * seq_len,
        "source_bytes": result["source_bytes"],
        "quantized_bytes": result["quantized_bytes"],
        "bound_bytes": bound,
        "planned_bytes": result["planned_bytes"],
        "peak_bytes": result["peak_bytes"],
        "peak_over_bound": result["peak_bytes"] / bound,
        "peak_over_plan": result["peak_bytes"] / result["planned_bytes"],
        "planned_seconds": result["planned_seconds"],
        "seconds": seconds,
    }


def write_random_checkpoint(directory: Path, shape: Shape) -> None:
    """Normal weights of the usual size, one file for each layer, so that this process stays small."""
    import torch

    from quant.formats.tensor_files import held, write_tensors

    generator = torch.Generator().manual_seed(0)

    def draw(size: tuple[int, ...]) -> torch.Tensor:
        if len(size) == 1:
            return torch.ones(size, dtype=torch.bfloat16)
        return (torch.randn(size, generator=generator) / size[1] ** 0.5).to(torch.bfloat16)

    _write_config(directory, shape)
    for name, sizes in shape.files.items():
        write_tensors(directory / name, [held(key, draw(size)) for key, size in sizes.items()], {"format": "pt"})


def write_hollow_checkpoint(directory: Path, shape: Shape) -> None:
    """The same with a hole in place of the weights, which read as zeros: it takes next to no disk."""
    _write_config(directory, shape)
    for name, sizes in shape.files.items():
        header: dict[str, object] = {}
        end = 0
        for key, size in sizes.items():
            start, end = end, end + 2 * math.prod(size)
            header[key] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (directory / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)


def _write_config(directory: Path, shape: Shape) -> None:
    directory.mkdir(parents=True)
    weight_map = {key: name for name, sizes in shape.files.items() for key in sizes}
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _work(source: Path, out: Path, samples: int, seq_len: int) -> int:
    """Quantise and print one line of JSON."""
    from collections.abc import Sequence as Ids

    from quant.commands import ServingAccess
    from quant.options import QuantizeOptions
    from quant.progress import LineProgress
    from quant.run.calibration import Encoder, Row
    from quant.run.plan import plan_run
    from quant.run.quantize_directory import peak_memory_bytes, quantize_with

    class BytesAccess(ServingAccess):
        """A random model has no tokenizer: bytes are as good."""

        def encoder(self, directory: Path) -> Encoder:
            def encode(row: Row) -> Ids[int]:
                return list((row.text + "".join(message.content for message in row.messages)).encode())

            return encode

        def chat_format_sha256(self, directory: Path) -> str | None:
            return None

    options = QuantizeOptions(samples=samples, seq_len=seq_len)
    access = BytesAccess()
    plan = plan_run(access.open(source), options, out)
    report = quantize_with(access, source, out, options, LineProgress(sys.stderr))
    record = {
        "peak_bytes": peak_memory_bytes(),
        "planned_bytes": plan.peak_memory_bytes,
        "planned_seconds": plan.seconds,
        "source_bytes": report.source_bytes,
        "quantized_bytes": report.quantized_bytes,
    }
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
