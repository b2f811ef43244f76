"""DeepSpeed's ZeRO through accelerate: full weights, one engine to a process, nothing saved before the end.

Stage 1 spreads the optimizer's state over the ranks, stage 2 the gradients as well, stage 3 the weights too. Gradients
are accumulated as in `loop.accumulate`; the engine clips and steps.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training.errors import TrainingError

# On a CPU it only shows that the sums are right, so tests alone allow it.
DEVICES: tuple[str, ...] = ("cuda",)
# Elements up to which stage 3 leaves a parameter whole on every rank.
KEPT_WHOLE = 100_000


@dataclass(frozen=True, slots=True)
class ZeroEngine:
    """engine: DeepSpeed's, which runs the model, its backward passes and the optimizer."""

    engine: Any

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradient of `loss`. is_last: of the step; the ranks' gradients are put together then."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss)

    def step(self, learning_rate: float) -> float:
        """Clip, step and clear. Returns the norm before clipping. Raises TrainingError if it is not a number."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm())
        if not self.engine.was_step_applied() or not bool(torch.isfinite(norm)):
            raise TrainingError("the gradient's norm is not a number; lower --learning-rate and start again")
        return float(norm)


def require_deepspeed(model: nn.Module, device: torch.device) -> None:
    """Raises TrainingError where `start_engine` could not train `model` rightly."""
    if importlib.util.find_spec("deepspeed") is None:
        raise TrainingError("--sharding deepspeed: DeepSpeed is not installed (pip install deepspeed)")
    if device.type not in DEVICES:
        raise TrainingError(f"--sharding deepspeed needs GPUs and would run on {device.type}; use --sharding fsdp")
    if not all(parameter.requires_grad for parameter in model.parameters()):
        # A frozen head is read outside of its forward pass, where stage 3 has not gathered it.
        raise TrainingError("--sharding deepspeed trains full weights; add --method full, or use --sharding fsdp")


def start_engine(root: nn.Module, optimizer: Optimizer, stage: int, max_grad_norm: float) -> ZeroEngine:
    """Spread `root` and its optimizer over the ranks that torchrun started."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    config = {
        "train_micro_batch_size_per_gpu": 1,  # it only counts samples
        "gradient_accumulation_steps": 1,  # `backward` says which batch is a step's last, and losses come divided
        "gradient_clipping": max_grad_norm,
        "steps_per_print": 2**31,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": KEPT_WHOLE},
    }
    plugin = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
    accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision="no")
    prepared: Any = accelerator.prepare(root, optimizer)
    return ZeroEngine(prepared[0])


def is_partitioned(tensor: Tensor) -> bool:
    """True for a parameter that stage 3 has spread over the ranks."""
    return hasattr(tensor, "ds_id")


def gathered(parameter: Tensor) -> Tensor:
    """A partitioned parameter's whole, in main memory on every rank. All ranks must call it."""
    deepspeed = importlib.import_module("deepspeed")
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().cpu().clone()
