"""Products of packed integer weights with int8 activations: packing, the twin, the self-check, and the kernel object.

Activations are quantised for each row and group of inputs, so a product differs from the dequantised one by about
0.5 %; `native_twin` computes the same product plainly, and against that the kernels are compared.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache

import torch
from torch import Tensor

from quant.errors import QuantizationError
from quant.method.matrix import SHUFFLED_GROUPS, QuantizedMatrix
from quant.native.large_pages import LargePages
from quant.native.levels import find_levels
from quant.native.library import load_library
from quant.native.packing import BLOCK_OUTPUTS, GROUP_MULTIPLE, CMatrix, by_block, pack_codes

logger = logging.getLogger(__name__)

# fp32 sums in another order.
NATIVE_RELATIVE_TOLERANCE = 1e-4

_FP32_TO_FP32, _BF16_TO_BF16, _BF16_TO_FP32 = range(3)


def why_not_native(matrix: QuantizedMatrix) -> str | None:
    """None if the native product takes this matrix, else the reason."""
    if matrix.bits not in (4, 8):
        return f"it takes 4 and 8 bits, not {matrix.bits}"
    if matrix.group_of_input is not None:
        return SHUFFLED_GROUPS
    if matrix.group_size % GROUP_MULTIPLE:
        return f"it takes group sizes that are multiples of {GROUP_MULTIPLE}, not {matrix.group_size}"
    if matrix.out_features % BLOCK_OUTPUTS:
        return f"it takes multiples of {BLOCK_OUTPUTS} outputs, not {matrix.out_features}"
    return None


class NativeLinear:
    """One matrix as the native kernels read it. Holds what `c_matrix` points to."""

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None, memory: LargePages | None = None) -> None:
        """memory: where the packed weights go, beside other matrices'; pages of their own if absent."""
        reason = why_not_native(matrix)
        if reason is not None:
            raise QuantizationError(f"this matrix cannot take the native product: {reason}")
        library = load_library()
        if library is None:
            raise QuantizationError("the native kernels are not available on this machine")
        self.in_features = matrix.in_features
        self.out_features = matrix.out_features
        self._call = library.causerie_linear
        memory = memory or LargePages()
        levelled = find_levels(matrix)
        bits = matrix.bits if levelled is None else 4
        packed = pack_codes((levelled or matrix).codes.numpy(), bits)
        self._codes = torch.from_numpy(memory.copy(packed))
        self._scales = _by_block((levelled or matrix).scales.to(torch.float16), memory)
        has_zeros = levelled is None and not bool((matrix.zeros == 1 << (bits - 1)).all())
        self._zeros = _by_block(matrix.zeros, memory) if has_zeros else None
        self._offsets = None if levelled is None else _by_block(levelled.offsets.to(torch.float16), memory)
        self._bias = None if bias is None else bias.detach().to(torch.float32, copy=True).contiguous()
        self.c_matrix = CMatrix(
            self._codes.data_ptr(),
            self._scales.data_ptr(),
            None if self._zeros is None else self._zeros.data_ptr(),
            None if self._offsets is None else self._offsets.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            self.in_features,
            self.out_features,
            matrix.group_size,
            bits,
        )

    @property
    def num_bytes(self) -> int:
        """Of the weights, as a product reads them."""
        parts = (self._codes, self._scales, self._zeros, self._offsets)
        return sum(part.nbytes for part in parts if part is not None)

    def __call__(self, x: Tensor) -> Tensor:
        """x: (rows, in), float32 or bfloat16; the product has its type."""
        return self._multiply(x, x.dtype, _FP32_TO_FP32 if x.dtype == torch.float32 else _BF16_TO_BF16)

    def to_float32(self, x: Tensor) -> Tensor:
        """The same of bfloat16 rows, not rounded back to their type."""
        return self._multiply(x, torch.float32, _FP32_TO_FP32 if x.dtype == torch.float32 else _BF16_TO_FP32)

    def _multiply(self, x: Tensor, dtype: torch.dtype, types: int) -> Tensor:
        if x.dtype not in (torch.float32, torch.bfloat16) or x.shape[1] != self.in_features:
            raise ValueError(f"expected (rows, {self.in_features}) float32 or bfloat16; got {tuple(x.shape)} {x.dtype}")
        x = x.contiguous()
        out = torch.empty(x.shape[0], self.out_features, dtype=dtype)
        matrix, threads = ctypes.byref(self.c_matrix), torch.get_num_threads()
        self._call(matrix, _pointer(x), _pointer(out), x.shape[0], types, threads)
        return out


def _by_block(values: Tensor, memory: LargePages) -> Tensor:
    return torch.from_numpy(memory.copy(by_block(values.numpy())))


def quantize_activations(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """x (rows, in) -> codes (rows, groups, group size) in -127..127 and scales (rows, groups, 1), both float32."""
    grouped = x.to(torch.float32).unflatten(1, (-1, group_size))
    largest = grouped.abs().amax(dim=-1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, torch.zeros_like(largest))
    return (grouped * inverse).round(), largest / 127


def native_twin(matrix: QuantizedMatrix, x: Tensor) -> Tensor:
    """What the native product computes, in float32: rounded activations times the dequantised weight."""
    codes, scales = quantize_activations(x, matrix.group_size)
    return (codes * scales).flatten(1) @ matrix.dequantize().t()


@cache
def is_native_right() -> bool:
    """Whether the library is there and agrees with the twin on small products; logs once."""
    if load_library() is None:
        return False
    matrices = (_check_matrix(4), _check_matrix(8), _check_matrix(8, on_levels=True))
    worst = max(_self_check_error(matrix, rows) for matrix in matrices for rows in (1, 5))
    is_right = worst <= NATIVE_RELATIVE_TOLERANCE
    log = logger.info if is_right else logger.warning
    log("native_self_check passed=%s error=%.1e", "yes" if is_right else "no", worst)
    return is_right


def _check_matrix(bits: int, *, on_levels: bool = False) -> QuantizedMatrix:
    """Every code and zero point, or 8-bit codes on 16 levels whose scales and offsets fp16 holds."""
    generator = torch.Generator().manual_seed(0)
    shape, group_size = (32, 128), 32
    groups = (shape[0], shape[1] // group_size)
    codes = torch.randint(0, 16 if on_levels else 1 << bits, shape, dtype=torch.uint8, generator=generator)
    scales = (torch.rand(groups, generator=generator) * 0.01 + 0.005).to(torch.float16).to(torch.float32)
    zeros = torch.randint(1, 1 << bits, groups, dtype=torch.uint8, generator=generator)
    return QuantizedMatrix(
        codes=codes * 17 if on_levels else codes,
        scales=torch.full_like(scales, 2.0**-7) if on_levels else scales,
        zeros=zeros,
        bits=bits,
        group_size=group_size,
    )


def _self_check_error(matrix: QuantizedMatrix, rows: int) -> float:
    x = torch.randn(rows, matrix.in_features, generator=torch.Generator().manual_seed(rows))
    expected = native_twin(matrix, x)
    error = float((NativeLinear(matrix, None)(x) - expected).norm() / expected.norm())
    return error if error == error else float("inf")


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
