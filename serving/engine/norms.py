"""Norms as the engine computes them: (..., width) float32 in, the same shape in the asked type out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from serving.model.spec import DecoderSpec
from serving.model.transformer import RmsNorm


class PreparedNorm(Protocol):
    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class PreparedRmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight, written over the norm: four small operators instead of the composite's six.

    mean(x^2) + eps = (norm(x)^2 + width * eps) / width.
    """

    scaled_weight: Tensor  # weight * sqrt(width), (width,) float32
    floor: Tensor  # sqrt(width * eps), ()

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.floor)
        return x.div(length).mul_(self.scaled_weight).to(dtype)


@dataclass(frozen=True, slots=True)
class PreparedLayerNorm:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias."""

    weight: Tensor  # (width,) float32
    bias: Tensor | None  # (width,) float32
    eps: float

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps).to(dtype)


def prepare_norm(norm: nn.Module, spec: DecoderSpec) -> PreparedNorm:
    """A copy: the module's own weight may go on being trained."""
    weight, bias = norm.weight, getattr(norm, "bias", None)
    assert isinstance(weight, Tensor)
    wide = weight.detach().to(torch.float32, copy=True)
    if not isinstance(norm, RmsNorm):
        shift = bias.detach().to(torch.float32, copy=True) if isinstance(bias, Tensor) else None
        return PreparedLayerNorm(wide, shift, spec.norm_eps)
    width = weight.shape[0]
    return PreparedRmsNorm(wide * width**0.5, torch.tensor((width * spec.norm_eps) ** 0.5))
