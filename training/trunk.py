"""A transformers model to train: loaded from a model directory, run on a `Batch`, written back as a model directory.

Weights that learn are float32 and matrix products run in the run's precision; a frozen trunk lies in that precision.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from quant.errors import CheckpointError
from quant.model_directory import MODEL_FILE_NAMES, JsonValue
from serving.model.chat_format import ChatFormat, NoChatTemplateError
from serving.model.tokenizer import ModelTokenizer
from training.batches import Batch, attention_mask, is_plain_causal
from training.errors import TrainingError
from training.settings import AdapterSettings, Precision

ADAPTER_FOLDER = "adapter"
# Logits held at once: 2 ** 24 float32 numbers are 67 MB.
_MAX_LOGITS = 2**24
_ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Compute:
    """Where and how precisely a run computes."""

    device: torch.device
    precision: torch.dtype

    @contextlib.contextmanager
    def autocast(self) -> Generator[None]:
        with torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32):
            yield


@dataclass(frozen=True, slots=True)
class Trunk:
    """model:      a transformers causal LM, or peft's wrapper of one
    chat_format:   None for a base model
    chat_template: to write with the model where it is not the source's own
    """

    model: nn.Module
    tokenizer: ModelTokenizer
    chat_format: ChatFormat | None
    source: Path
    compute: Compute
    chat_template: str | None = None


def choose_compute(device: str, precision: Precision) -> Compute:
    """`auto`: the GPU if there is one; bfloat16 on a GPU and on CPUs that multiply it in hardware."""
    chosen = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: torch sees no GPU; use --device cpu, or install a CUDA build of torch")
    if precision == "auto":
        is_fast = chosen.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return Compute(chosen, torch.bfloat16 if is_fast else torch.float32)
    return Compute(chosen, torch.bfloat16 if precision == "bfloat16" else torch.float32)


def load_trunk(directory: Path, compute: Compute, adapters: AdapterSettings, *, checkpointing: bool = False) -> Trunk:
    """The model of `directory` with the weights that `adapters` names trainable. Raises CheckpointError."""
    tokenizer = ModelTokenizer.load(directory)
    model = _load_model(directory, compute, adapters)
    if adapters.method != "full":
        model = _add_lora(model, adapters)
    if checkpointing:
        recompute_activations(model)
    return Trunk(model.train(), tokenizer, load_chat_format(directory, tokenizer), directory, compute)


def recompute_activations(model: nn.Module) -> None:
    """Gradient checkpointing, by the name that this transformers calls it."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or cast("Any", model).gradient_checkpointing_enable)({"use_reentrant": False})


def load_chat_format(directory: Path, tokenizer: ModelTokenizer) -> ChatFormat | None:
    try:
        return ChatFormat.load(directory, tokenizer)
    except NoChatTemplateError:
        return None


def load_plain_model(directory: Path, dtype: torch.dtype) -> nn.Module:
    """A transformers causal LM from a directory's safetensors. Raises CheckpointError for anything else."""
    from transformers import AutoModelForCausalLM

    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} has no config.json; a model directory is needed")
    if (directory / "quantize_config.json").is_file():
        raise CheckpointError(f"{directory} is quantised; train the model that it was made from, then quantise again")
    try:
        with quiet():
            return AutoModelForCausalLM.from_pretrained(
                str(directory), dtype=dtype, local_files_only=True, use_safetensors=True, attn_implementation="sdpa"
            )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} cannot be loaded for training: {' '.join(str(error).split())}") from error


def inner_model(model: nn.Module) -> Any:
    """The transformers causal LM inside: `.model` gives hidden states, `.lm_head` logits."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if unwrap is not None else model


def final_hidden(model: nn.Module, batch: Batch) -> Tensor:
    """(rows, length, hidden) after the final norm, in the run's precision; padding holds numbers of no meaning."""
    # Behind right padding a plain causal mask is the same on real tokens, and has faster kernels.
    mask = None if is_plain_causal(batch) else attention_mask(batch)
    output = inner_model(model).model(
        input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
    )
    return cast("Tensor", output.last_hidden_state)


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """(..., hidden) -> (..., vocabulary) float32, the family's logit scale applied."""
    inner = inner_model(model)
    logits = cast("Tensor", inner.lm_head(hidden)).float()
    return logits * logit_scale(model)


def logit_scale(model: nn.Module) -> float:
    return float(getattr(inner_model(model).config, "logit_scale", None) or 1.0)


def target_logprobs(
    model: nn.Module, hidden: Tensor, ids: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given ids, without ever holding all logits.

    hidden: (n, hidden) at the positions before the ids; ids: (n,) int64.
    Returns (log-probabilities, log Z), each (n,) float32, under the distribution at `temperature`.
    """
    inner = inner_model(model)
    weight: Tensor = inner.lm_head.weight
    scale = logit_scale(model) / temperature
    rows = max(1, _MAX_LOGITS // weight.shape[0])
    is_frozen = not weight.requires_grad and getattr(inner.lm_head, "bias", None) is None
    parts: list[tuple[Tensor, Tensor]] = []
    for start in range(0, max(1, hidden.shape[0]), rows):
        part, part_ids = hidden[start : start + rows], ids[start : start + rows]
        if is_frozen and torch.is_grad_enabled():
            parts.append(cast("tuple[Tensor, Tensor]", _FrozenHead.apply(part, weight, part_ids, scale)))
        elif hidden.shape[0] <= rows or not torch.is_grad_enabled():
            parts.append(_logprobs(inner.lm_head, part, part_ids, scale))
        else:
            from torch.utils.checkpoint import checkpoint

            parts.append(checkpoint(_logprobs, inner.lm_head, part, part_ids, scale, use_reentrant=False))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _logprobs(head: nn.Module, hidden: Tensor, ids: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float() * scale
    log_z = logits.logsumexp(dim=-1)
    return logits.gather(-1, ids[:, None])[:, 0] - log_z, log_z


class _FrozenHead(torch.autograd.Function):
    """`_logprobs` through a head that does not learn: the gradient's product is taken while the logits are there.

    d logprob_i / d hidden_i = scale * (W[id_i] - p_i W) does not depend on what comes after, so the forward pass keeps
    it, one row of hidden size each, instead of the logits. The gradient of log Z is scale * p_i W likewise.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        logits = (hidden.to(weight.dtype) @ weight.t()).float().mul_(scale)
        log_z = logits.logsumexp(dim=-1)
        logprobs = logits.gather(-1, ids[:, None])[:, 0] - log_z
        probabilities = logits.sub_(log_z[:, None]).exp_().to(weight.dtype)
        expected = (probabilities @ weight).mul_(scale)
        ctx.save_for_backward(weight[ids] * scale - expected, expected)
        ctx.dtype = hidden.dtype
        return logprobs, log_z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        of_logprobs, of_log_z = ctx.saved_tensors
        grad = of_logprobs.float() * gradients[0][:, None] + of_log_z.float() * gradients[1][:, None]
        return grad.to(ctx.dtype), None, None, None


def write_weights(trunk: Trunk, directory: Path, adapters: AdapterSettings, state: Mapping[str, Tensor]) -> None:
    """config.json and plain weights; with adapters the merged ones in the source's dtype, and `adapter/` as peft's.

    state: the whole state of `trunk.model`, by name (`distributed.full_tensors`).
    """
    if adapters.method == "full":
        # The float32 weights themselves: rounding between stages would be lost training.
        _save(trunk.model, directory, state)
        return
    from peft import PeftModel

    _save(trunk.model, directory / ADAPTER_FOLDER, state)
    # Merged into the source as stored, not into the run's copy of it, which may be in bfloat16 or 4 bits.
    plain = load_plain_model(trunk.source, torch.float32)
    with quiet():
        merged = PeftModel.from_pretrained(plain, str(directory / ADAPTER_FOLDER)).merge_and_unload()
    _tidy_adapter(directory / ADAPTER_FOLDER, trunk.source.name)
    _save(merged.to(stored_dtype(trunk.source)), directory, None)


def _save(model: nn.Module, directory: Path, state: Mapping[str, Tensor] | None) -> None:
    with quiet():
        cast("Any", model).save_pretrained(str(directory), state_dict=state)


def _tidy_adapter(directory: Path, trunk_name: str) -> None:
    """peft notes where the trunk lies on this machine, and adds an empty model card."""
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "base_model_name_or_path": trunk_name}, indent=2) + "\n", encoding="utf-8")
    (directory / "README.md").unlink(missing_ok=True)


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Without transformers' own bars: a run has one of its own. Without what peft still calls by its older name."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            yield
    finally:
        logging.enable_progress_bar()


def copy_text_files(source: Path, target: Path) -> None:
    """Tokenizer, chat template and generation defaults; config.json is the weights' writer's."""
    for name in sorted(MODEL_FILE_NAMES - {"config.json", "model.safetensors.index.json", "quantize_config.json"}):
        if (source / name).is_file() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)


def stored_dtype(directory: Path) -> torch.dtype:
    from safetensors import safe_open

    from serving.model.weights import locate_tensors

    name, file = next(iter(locate_tensors(directory).items()))
    with safe_open(file, framework="pt") as source:
        return cast("Tensor", source.get_tensor(name)).dtype


def _load_model(directory: Path, compute: Compute, adapters: AdapterSettings) -> nn.Module:
    if adapters.method == "qlora":
        return _load_four_bits(directory, compute)
    dtype = torch.float32 if adapters.method == "full" else compute.precision
    return load_plain_model(directory, dtype).to(compute.device)


def _load_four_bits(directory: Path, compute: Compute) -> nn.Module:
    try:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    except ImportError as error:
        raise TrainingError("QLoRA needs bitsandbytes (pip install 'causerie[train]')") from error
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute.precision,
    )
    return AutoModelForCausalLM.from_pretrained(
        str(directory),
        quantization_config=quantization,
        dtype=compute.precision,
        device_map={"": compute.device},
        local_files_only=True,
        use_safetensors=True,
    )


def _add_lora(model: nn.Module, adapters: AdapterSettings) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapters.lora_rank,
        lora_alpha=adapters.lora_alpha,
        lora_dropout=adapters.lora_dropout,
        target_modules=list(_ADAPTED),
    )
    with quiet():
        return get_peft_model(cast("Any", model), config)


def manifest_config(record: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
    """A stage's settings without what only concerns the run (resuming, logging)."""
    hidden = {"resume", "log_every", "checkpoint_every", "keep_checkpoints", "out"}
    return {name: value for name, value in record.items() if name not in hidden}
