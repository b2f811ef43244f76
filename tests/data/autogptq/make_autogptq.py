"""Writes CASE/ for each case: a tiny random Llama, quantised and saved by auto-gptq 0.7.1, with the logits it computes.

    python -m benchmarks.quantizer_setup WORK auto-gptq
    WORK/auto-gptq/bin/python tests/data/autogptq/make_autogptq.py

auto-gptq quantises on a GPU only; here its device is the processor and the waits for a GPU are left out. Every number
in the files is what its own code computed: quantiser, packing, saving, and the products of its `QuantLinear`.
"""

# auto-gptq is not installed where types are checked.
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

from pathlib import Path

import auto_gptq.modeling._base as base
import auto_gptq.modeling._utils as utils
import torch
from auto_gptq import BaseQuantizeConfig
from auto_gptq.modeling.llama import LlamaGPTQForCausalLM
from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
CPU = torch.device("cpu")
CASES = {
    "sym-4bit-g32": BaseQuantizeConfig(bits=4, group_size=32, sym=True, desc_act=False),
    "asym-4bit-g32": BaseQuantizeConfig(bits=4, group_size=32, sym=False, desc_act=False),
    "act-order-4bit-g32": BaseQuantizeConfig(bits=4, group_size=32, sym=True, desc_act=True),
    "sym-8bit-row": BaseQuantizeConfig(bits=8, group_size=-1, sym=True, desc_act=False),
}


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() == 2 else 1.0)
    model.config.architectures = [type(model).__name__]  # as every model has that was loaded from a directory
    return model.to(torch.float32).eval()


def write(name: str, config: BaseQuantizeConfig) -> None:
    model = LlamaGPTQForCausalLM(tiny_model(), False, config)
    chances = torch.logspace(0, -2, 96)
    ids = torch.multinomial(chances.expand(32, -1), 48, replacement=True)
    model.quantize([{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids])
    target = HERE / name
    model.save_quantized(str(target))
    for path in target.glob("gptq_model-*.safetensors"):
        path.rename(target / "model.safetensors")
    multiply_on_the_processor(model.model, config)
    with torch.no_grad():
        logits = model.model.to(torch.float32)(ids[:2]).logits
    save_file({"ids": ids[:2].contiguous(), "logits": logits.float().contiguous()}, target / "expected.safetensors")


def multiply_on_the_processor(model: LlamaForCausalLM, config: BaseQuantizeConfig) -> None:
    """Its packed linears are for a GPU's kernels: the same tensors in its linear that multiplies with torch."""
    for name, packed in list(model.named_modules()):
        if hasattr(packed, "qweight"):
            linear = QuantLinear(config.bits, config.group_size, packed.infeatures, packed.outfeatures, bias=False)
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                setattr(linear, part, getattr(packed, part))
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, linear)


def main() -> None:
    for module in (base, utils):
        module.CUDA_0 = CPU
    torch.cuda.synchronize = lambda *_: None
    for name, config in CASES.items():
        write(name, config)


if __name__ == "__main__":
    main()
