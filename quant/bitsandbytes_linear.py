"""Plain weights rounded while a model loads: bitsandbytes' NF4 and int8 products, behind `causerie serve --load-in`.

Nothing is calibrated and nothing is written: quicker to try than GPTQ, larger or worse for the same bytes. On a GPU the
products are fast; on a CPU they are right and slow. The twin of each is bitsandbytes' own dequantised weight.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Generator
from enum import StrEnum
from types import ModuleType

import torch
from torch import Tensor

from quant.errors import QuantizationError
from quant.int4_linear import KernelName

logger = logging.getLogger(__name__)

# Values that share a scale in NF4, along the flattened weight: bitsandbytes' default.
NF4_BLOCK = 64


class LoadIn(StrEnum):
    NF4 = "nf4"
    INT8 = "int8"

    @property
    def kernel_name(self) -> KernelName:
        return KernelName(f"bitsandbytes_{self.value}")


def load_in_of(name: KernelName) -> LoadIn | None:
    """The other way round; None for a kernel that is not bitsandbytes'."""
    return next((load_in for load_in in LoadIn if load_in.kernel_name is name), None)


class Nf4Kernel:
    """x @ W.T + bias with W in 4-bit normal floats, 64 values to a scale, decoded in every product."""

    def __init__(self, weight: Tensor, bias: Tensor | None, device: torch.device) -> None:
        """weight: (out, in), any floating type. The product is computed in bf16 on `device`."""
        bnb = _bitsandbytes()
        self.out_features, self.in_features = weight.shape
        plain = weight.detach().to(device, torch.bfloat16)
        self._codes, self._state = bnb.functional.quantize_4bit(plain, blocksize=NF4_BLOCK, quant_type="nf4")
        self._bias = None if bias is None else bias.detach().to(device, torch.bfloat16)
        self._device = device
        self._matmul = bnb.matmul_4bit
        self._dequantize = bnb.functional.dequantize_4bit

    def __call__(self, x: Tensor) -> Tensor:
        near = x.to(self._device, torch.bfloat16)
        return self._matmul(near, self._codes.t(), quant_state=self._state, bias=self._bias).to(x.device, x.dtype)

    def twin_weight(self) -> Tensor:
        """(out, in) float32: the weight that the product stands for."""
        return self._dequantize(self._codes, self._state).to("cpu", torch.float32)


class Int8Kernel:
    """x @ W.T + bias in int8: a scale for each row of W, and one for each row of x, rounded when it comes.

    LLM.int8() keeps outlying inputs in fp16; which ones depends on all rows of a batch, so one request would change
    another's answer. We do without: every row is rounded by itself. Source: arXiv:2208.07339, section 2.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, device: torch.device) -> None:
        """weight: (out, in), any floating type, with values that fp16 holds."""
        functional = _bitsandbytes().functional
        self.out_features, self.in_features = weight.shape
        self._round_rows = functional.int8_vectorwise_quant
        self._multiply = functional.int8_linear_matmul
        self._rescale = functional.int8_mm_dequant
        self._dequantize = functional.int8_vectorwise_dequant
        self._codes, self._scales, _ = self._round_rows(weight.detach().to(device, torch.float16))
        self._bias = None if bias is None else bias.detach().to(device, torch.float16)
        self._device = device

    def __call__(self, x: Tensor) -> Tensor:
        codes, scales, _ = self._round_rows(x.to(self._device, torch.float16))
        product = self._rescale(self._multiply(codes, self._codes), scales, self._scales, bias=self._bias)
        return product.to(x.device, x.dtype)

    def twin_weight(self) -> Tensor:
        """(out, in) float32: the weight that the product stands for."""
        return self._dequantize(self._codes, self._scales).to("cpu", torch.float32)


def build_bitsandbytes_kernel(weight: Tensor, bias: Tensor | None, load_in: LoadIn) -> Nf4Kernel | Int8Kernel:
    """The product for a plain weight (out, in), on the GPU if there is one: activations go there and come back."""
    kind = Nf4Kernel if load_in is LoadIn.NF4 else Int8Kernel
    return kind(weight, bias, _device())


def announce_bitsandbytes(load_in: LoadIn) -> None:
    """One log line on where the products run. Raises QuantizationError if bitsandbytes is not installed."""
    version, device = _bitsandbytes().__version__, _device()
    speed = "fast" if device.type == "cuda" else "slow_on_a_cpu:_a_gptq_directory_is_several_times_faster"
    logger.info("load_in name=%s bitsandbytes=%s device=%s speed=%s", load_in.value, version, device, speed)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _bitsandbytes() -> ModuleType:
    try:
        with _without_fetched_kernels():
            return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise QuantizationError(
            f"bitsandbytes cannot be imported ({error}), and --load-in needs it; pip install 'causerie[gpu]', "
            "or leave --load-in out to serve the model as 4-bit GPTQ"
        ) from error


@contextlib.contextmanager
def _without_fetched_kernels() -> Generator[None]:
    """On import bitsandbytes downloads compiled code and runs it, where the package `kernels` is there; not with us."""
    hidden, log = sys.modules.get("kernels"), logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    sys.modules["kernels"] = None  # type: ignore[assignment]  # None makes its import fail
    log.setLevel(logging.ERROR)  # else it advises installing that package
    try:
        yield
    finally:
        log.setLevel(level)
        if hidden is None:
            sys.modules.pop("kernels", None)
        else:
            sys.modules["kernels"] = hidden
